"""What every encoder promises: sizes, independence of padding and batch-mates, gradients, behaviour on odd input."""

import json

import huggingface_hub.constants
import pytest
import torch
from rewards.tiny_encoders import ENCODERS, LENGTH, build
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPProcessor

from pisces_rl.rewards.encoders import load_encoder

PROMPTS = ["a red circle moving left", "two blue squares on black", ""]


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    return build(request.param)


@pytest.fixture(scope="module")
def videos():
    return torch.rand(3, 7, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_sizes(encoder, videos):
    text, video = encoder.encode_text(PROMPTS), encoder.encode_video(videos)
    assert text.pooled.shape == video.pooled.shape == (3, encoder.dimension)
    for features in (text.pooled, video.pooled):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert text.mask.shape == text.words.shape == text.tokens.shape[:2] and video.tokens.shape[0] == 3
    assert video.positions.shape == (video.tokens.shape[1], 3)
    assert text.words.sum(1).tolist() == [5, 5, 0]
    assert [p for p, word in zip(text.pieces[0], text.words[0]) if word] == PROMPTS[0].split()
    assert len(video.pooled.unique(dim=0)) == 3, "different videos have different features"


@pytest.mark.parametrize("name", ["clip", "siglip", "xclip", "videoprism", "pe_video", "blip"])
def test_features_are_those_of_the_models_own_forward_pass(name, videos):
    encoder, frame_by_frame = build(name), name in ("clip", "siglip", "blip")
    videos = videos[:2, :1] if frame_by_frame else videos[:2]  # alike frames: their mean is any of them
    text, video = encoder.encode_text(PROMPTS[:2]), encoder.encode_video(videos)
    pixels = encoder.prepare(videos)
    fixed = dict(padding="max_length", max_length=LENGTH) if name in ("siglip", "videoprism") else dict(padding=True)
    tokens = encoder.tokenizer(PROMPTS[:2], return_tensors="pt", **fixed)
    inputs = {"input_ids": tokens["input_ids"], "pixel_values": pixels[:, 0] if frame_by_frame else pixels}
    if name != "siglip":
        inputs["attention_mask"] = tokens["attention_mask"]
    if name in ("videoprism", "pe_video"):
        inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    if name == "blip":
        own = type(encoder.model)(encoder.model.config).eval()  # the encoder's cross-attention is not the model's own
        own.load_state_dict(encoder.model.state_dict())
        matches, cosines = (own(**inputs, use_itm_head=head).itm_score for head in (True, False))
        torch.testing.assert_close(encoder.match(text, video), matches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(video.pooled @ text.pooled.T, cosines, rtol=1e-4, atol=1e-5)
        return
    out = encoder.model(**inputs)
    whose = out.image_embeds if frame_by_frame else out.video_embeds
    torch.testing.assert_close(video.pooled, normalize(whose, dim=-1), rtol=1e-4, atol=1e-5)
    if name != "xclip":  # whose texts the video rewrites
        words = out.text_video_embeds if name == "pe_video" else out.text_embeds
        torch.testing.assert_close(text.pooled, normalize(words, dim=-1), rtol=1e-4, atol=1e-5)


def test_batch_mates_and_padding_change_nothing(encoder, videos):
    text, video = encoder.encode_text(PROMPTS), encoder.encode_video(videos)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(encoder.encode_text([prompt]).pooled[0], text.pooled[row], rtol=1e-4, atol=1e-5)
        alone = encoder.encode_video(videos[row : row + 1])
        torch.testing.assert_close(alone.pooled[0], video.pooled[row], rtol=1e-4, atol=1e-5)
        if encoder.matches:
            logits = encoder.match(text, video)
            own = encoder.match(encoder.encode_text([prompt]), alone)
            torch.testing.assert_close(own[0], logits[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_the_finite_differences(name):
    encoder = build(name, torch.float64)
    generator = torch.Generator().manual_seed(2)
    videos = 0.2 + 0.6 * torch.rand(1, 4, 3, 20, 20, generator=generator, dtype=torch.float64)
    direction = torch.randn(videos.shape, generator=generator, dtype=torch.float64)

    def value(x):
        return encoder.encode_video(x).pooled[0, :3].sum()

    videos.requires_grad_()
    (gradient,) = torch.autograd.grad(value(videos), videos)
    tolerance = 1e-2 if name == "videoprism" else 1e-4  # its softmax is in fp32

    def difference(step):
        return (value(videos + step * direction) - value(videos - step * direction)) / (2 * step)

    with torch.no_grad():  # extrapolated to step 0, so the steps can be far above the rounding of parts in fp32
        slope = (4 * difference(1e-3) - difference(2e-3)) / 3
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=tolerance, abs=1e-9)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.5])
def test_constant_videos_have_finite_features_and_gradients(encoder, fill):
    videos = torch.full((1, 5, 3, 16, 16), fill, requires_grad=True)
    features = encoder.encode_video(videos)
    assert features.pooled.isfinite().all()
    features.pooled[0, 0].backward()
    assert videos.grad.isfinite().all()


def test_short_videos_repeat_frames(encoder, videos):
    one = encoder.encode_video(videos[:, :1])
    same = encoder.encode_video(videos[:, :1].expand(-1, 9, -1, -1, -1))
    torch.testing.assert_close(one.pooled, same.pooled)


def test_bad_videos_are_named(encoder, videos):
    nan = videos.clone()
    nan[1, 2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="video 1 has values from nan"):
        encoder.encode_video(nan)
    with pytest.raises(ValueError, match="video 0 has values.*expected finite pixels in .0, 1."):
        encoder.encode_video(videos * 255)
    with pytest.raises(ValueError, match="video 0 has values"):
        encoder.encode_video(videos * 2 - 1)
    with pytest.raises(ValueError, match="expected a tensor"):
        encoder.encode_video(videos.transpose(1, 2))
    overshoot = encoder.encode_video(videos * 1.1 - 0.05)
    torch.testing.assert_close(overshoot.pooled, encoder.encode_video((videos * 1.1 - 0.05).clamp(0, 1)).pooled)


def test_long_prompts_are_cut_with_a_warning(encoder):
    with pytest.warns(UserWarning, match=f"longer than the {LENGTH} tokens"):
        text = encoder.encode_text(["a red " * 20, "a"])
    assert text.mask.shape[1] <= LENGTH


def test_only_matchers_match(encoder, videos):
    assert encoder.matches == (encoder.name in ("tiny-vtm", "internvideo2-stage2-1b", "blip"))
    text, video = encoder.encode_text(PROMPTS), encoder.encode_video(videos)
    if encoder.matches:
        assert encoder.match(text, video).shape == (3, 2)
    else:
        with pytest.raises(ValueError, match="no matching head"):
            encoder.match(text, video)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENCODERS)
def test_half_precision(name, dtype, videos):
    half, whole = build(name, dtype), build(name)
    for ours, exact in (
        (half.encode_video(videos), whole.encode_video(videos)),
        (half.encode_text(PROMPTS), whole.encode_text(PROMPTS)),
    ):
        assert ours.pooled.dtype == torch.float32 and ours.tokens.dtype == dtype
        torch.testing.assert_close(ours.pooled, exact.pooled, rtol=0, atol=0.03)
    if half.matches:
        assert half.match(half.encode_text(PROMPTS), half.encode_video(videos)).isfinite().all()


def save(encoder, folder):
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_name_says_which_weights_and_options(tmp_path):
    encoder = build("clip")
    folder = save(encoder, tmp_path / "clip")
    options = ({}, {}, {"num_frames": 8}, {"num_frames": 4})
    names = [load_encoder(folder, device="cpu", **kind).name for kind in options]
    assert names[0].startswith("clip@") and names[1] == names[2] == names[0] and names[3] == f"{names[0]} num_frames=4"
    encoder.model.logit_scale.data += 1
    others = [load_encoder(save(encoder, tmp_path / "clip"), device="cpu").name]
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    for file in ("preprocessor_config.json", "config.json", "tokenizer.json"):
        (tmp_path / "clip" / file).write_text((tmp_path / "clip" / file).read_text() + " ")
        others.append(load_encoder(folder, device="cpu").name)
    (tmp_path / "clip" / "map.json").write_text("{}")
    assert load_encoder(folder, device="cpu").name == others[-1], "what the encoder does not read"
    assert len({*names[:1], *others}) == 5 and all(name.startswith("clip@") for name in others)


def test_pixels_are_normalised_as_the_processor_says(tmp_path):
    folder, nested = save(build("clip"), tmp_path), {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    assert load_encoder(folder).mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)  # CLIP's own
    assert load_encoder(save(build("siglip"), tmp_path / "siglip")).mean == (0.5, 0.5, 0.5)
    plain = load_encoder(folder).name
    processor = CLIPProcessor(CLIPImageProcessorPil(**nested), build("clip").tokenizer)
    processor.save_pretrained(folder)
    assert (tmp_path / "processor_config.json").is_file() and not (tmp_path / "preprocessor_config.json").exists()
    loaded = load_encoder(folder)
    assert loaded.mean == (0.1, 0.2, 0.3) and loaded.std == (1, 2, 3) and loaded.name != plain
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": nested | {"image_std": [4, 5, 6]}}))
    assert load_encoder(folder).std == (4, 5, 6)


def test_the_name_of_a_hub_model_has_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--clip"
    save(build("clip"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_encoder("me/clip", device="cpu").name == "me/clip@0123456789ab"


def test_options_that_nothing_reads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_frames: encoder 'tiny-vtm' takes no options"):
        load_encoder("tiny-vtm", num_frames=8)
    with pytest.raises(ValueError, match="num_frames: .* takes no options"):
        load_encoder(build("clip"), num_frames=8)
    folder = save(build("clip"), tmp_path)
    with pytest.raises(ValueError, match="frames: .* takes num_frames, mean, std"):
        load_encoder(folder, frames=8)
    assert load_encoder(build("clip"), dtype=torch.float64).precision == torch.float64
