"""What every encoder promises: sizes, independence of padding and batch-mates, gradients, behaviour on odd input."""

import pytest
import torch
from rewards.tiny_encoders import ENCODERS, LENGTH, build

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
    step, tolerance = (1e-3, 1e-2) if name == "videoprism" else (1e-5, 1e-4)  # its softmax is in fp32
    with torch.no_grad():
        slope = (value(videos + step * direction) - value(videos - step * direction)) / (2 * step)
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
