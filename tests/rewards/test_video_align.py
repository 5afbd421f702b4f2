"""VideoAlign with a tiny random Qwen2-VL; names and shapes of its weights against the published file."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_qwen import VIDEO, config, full_config, model, tokenizer
from torch import nn
from transformers import Qwen2VLImageProcessorPil

from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD
from pisces_rl.rewards.scorers import video_align
from pisces_rl.rewards.scorers.frame_scorer import scale
from pisces_rl.rewards.scorers.published_weights import shapes_of
from pisces_rl.rewards.scorers.qwen2_vl_reward import qwen_patches, qwen_size
from pisces_rl.rewards.scorers.video_align import MEAN, STD, VideoAlign, frames_seen, load_video_align, official_shapes

TEMPLATE = "quality: <|VQ_reward|> END motion: <|MQ_reward|> END text: {text_prompt} <|TA_reward|> END"
PROMPTS = ["a red circle moving left", "a blue square"]

# of checkpoint-11352/model.pth in KwaiVGI/VideoReward
PUBLISHED = {
    "base_model.model.visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
    "base_model.model.visual.blocks.31.attn.qkv.weight": (3840, 1280),
    "base_model.model.visual.merger.mlp.2.weight": (1536, 5120),
    "base_model.model.model.embed_tokens.weight": (151660, 1536),
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": (1536, 1536),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": (64, 1536),
    "base_model.model.model.layers.27.self_attn.k_proj.base_layer.bias": (256,),
    "base_model.model.model.layers.27.mlp.down_proj.lora_B.default.weight": (1536, 64),
    "base_model.model.model.layers.27.input_layernorm.weight": (1536,),
    "base_model.model.model.norm.weight": (1536,),
    "base_model.model.rm_head.weight": (1, 1536),
}
PUBLISHED_BYTES = 5_031_072_529


def videos(count=2, frames=9, height=72, width=104):
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def reward(**options) -> VideoAlign:
    return VideoAlign(model(video_align.head(16)), tokenizer(), TEMPLATE, **options)


def test_names_and_shapes_are_the_published_ones():
    """The published file holds bf16 and, beside these, a word head as large as the embedding: its size tells."""
    shapes = official_shapes(full_config("2B", 151660))
    assert {name: shapes[name] for name in PUBLISHED} == PUBLISHED
    expected = 2 * (sum(map(math.prod, shapes.values())) + 151660 * 1536)
    assert 0 < PUBLISHED_BYTES - expected < 300 * (len(shapes) + 1)  # what the pickle says of each tensor


@pytest.mark.parametrize("size", [(56, 84), (100, 60), (480, 832), (30, 400)])
def test_sizes_and_patches_are_those_of_the_models_processor(size):
    """Its processor takes images, which are two equal frames to the model."""
    processor = Qwen2VLImageProcessorPil(min_pixels=8 * 28**2, max_pixels=24 * 28**2)
    frame = (videos(1, 1, *size)[0, 0] * 255).round().byte()
    theirs = processor(frame, return_tensors="pt")
    target = qwen_size(*size, 8 * 28**2, 24 * 28**2)
    ours, grid = qwen_patches(frame[None, None] / 255, target, full_config("2B", 8).vision_config)
    assert [list(grid)] == theirs["image_grid_thw"].tolist() and ours[0].shape == theirs["pixel_values"].shape
    assert (ours[0] - theirs["pixel_values"]).abs().max() <= (2 if target != size else 0.01) / 255 / 0.26


def test_patches_hold_two_frames_in_order():
    """The patch embedding of a clip's patches is the convolution over the clip."""
    tower = model(video_align.head(16)).model.visual
    clip = videos(1, 5, 16, 24)
    patches, grid = qwen_patches(clip, (16, 24), tower.config)
    assert grid == (3, 4, 6)
    still = torch.cat([clip, clip[:, -1:]], 1)
    pixels, _ = qwen_patches(still, (16, 24), tower.config)
    torch.testing.assert_close(patches, pixels)
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    convolved = tower.patch_embed.proj(((still - mean) / std)[0].transpose(0, 1)[None])[0]  # channel, t, h, w
    merged = convolved.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(1, 2, 4, 3, 5, 0).flatten(0, 4)
    torch.testing.assert_close(tower.patch_embed(patches[0]), merged, rtol=1e-4, atol=1e-5)


def test_frames_are_scaled_as_by_torchvision():
    """Which interpolates bytes in float, rounds and clamps once."""
    frames = (videos(1, 2, 60, 90)[0] * 255).round()
    theirs = (
        F.interpolate(frames, (84, 112), mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
    )
    assert (scale(frames / 255, (84, 112), passes=False) * 255 - theirs).abs().max() <= 0.51


@pytest.mark.parametrize(
    ("frames", "fps", "seen"), [(81, 16, 10), (49, 8, 12), (9, 16, 4), (3, 16, 2), (2, 24, 2), (5, 1, 4), (17, 8, 4)]
)
def test_frames_seen(frames, fps, seen):
    assert frames_seen(frames, fps) == seen


def test_the_score_is_the_sum_of_normalised_heads_at_the_special_tokens():
    scorer, clips = reward(batch_size=1), videos()
    scores, parts = scorer.scores(PROMPTS, clips), {}
    total = scorer(PROMPTS, clips, log_extra=parts.__setitem__)
    torch.testing.assert_close(total, scores.sum(1))
    assert list(parts) == ["video_align_VQ", "video_align_MQ", "video_align_TA"]
    patches, grid = qwen_patches(
        clips[:1, [0, 3, 5, 8]], (80, 112), scorer.model.model.config.vision_config, passes=False
    )
    text = f"<|im_start|>user\n<|vision_start|>{VIDEO * (math.prod(grid) // 4)}<|vision_end|>"
    text += f"{TEMPLATE.replace('{text_prompt}', PROMPTS[0])}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(scorer.tokenizer(text)["input_ids"])
    hidden = scorer.model.model(
        input_ids=ids[None],
        pixel_values_videos=patches[0],
        video_grid_thw=torch.tensor([grid]),
        mm_token_type_ids=(ids == scorer.tokenizer.convert_tokens_to_ids(VIDEO)).int()[None] * 2,
    ).last_hidden_state[0]
    marks = [ids.tolist().index(scorer.tokenizer.convert_tokens_to_ids(token)) for token in scorer.special]
    by_hand = (hidden[marks] @ scorer.model.rm_head.weight[0] - torch.tensor(MEAN)) / torch.tensor(STD)
    assert qwen_size(72, 104, 128 * 64, 256 * 64, factor=8) == (80, 112)
    torch.testing.assert_close(scores[0], by_hand, rtol=1e-4, atol=1e-4)
    only = reward(weights=(0.0, 0.5, 0.0))(PROMPTS, clips)
    torch.testing.assert_close(only, 0.5 * scores[:, 1], rtol=1e-4, atol=1e-4)


def test_batch_mates_and_padding_change_nothing_and_it_is_a_reward():
    scorer, clips = reward(batch_size=2), videos()
    alone = torch.cat([scorer([prompt], clip[None]) for prompt, clip in zip(PROMPTS, clips)])
    table = RewardPanel(scorer)(PROMPTS, clips, {})
    torch.testing.assert_close(table.values[:, 0], alone, rtol=1e-4, atol=1e-4)
    swapped = scorer(PROMPTS[::-1], clips)
    assert (swapped - alone).abs().min() > 1e-6 and not alone.requires_grad
    moved = scorer(PROMPTS, clips.flip(1))  # it sees the order of frames
    assert (moved - alone).abs().min() > 1e-6


def test_its_gradient_is_the_finite_difference():
    """Along one direction, with a step that the fp32 norms of Qwen2-VL can resolve."""
    scorer = VideoAlign(model(video_align.head(16)).double(), tokenizer(), TEMPLATE)
    clip = (0.3 + 0.4 * videos(1, 2).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(PROMPTS[:1], clip).sum(), clip)
    direction = gradient / gradient.norm()
    step = 1e-2 * direction
    with torch.no_grad():
        slope = (scorer(PROMPTS[:1], clip + step) - scorer(PROMPTS[:1], clip - step)) / 2e-2
    torch.testing.assert_close(slope.item(), gradient.norm().item(), rtol=1e-2, atol=0)


def published_state(scale: float = 0.1) -> dict[str, torch.Tensor]:
    """A tiny checkpoint under the published names, with the word head that nothing reads."""
    generator = torch.Generator().manual_seed(3)
    shapes = official_shapes(config()) | {"base_model.model.lm_head.weight": (32, 16)}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_published_layout_is_loaded_and_lora_added(tmp_path):
    state = published_state()
    (tmp_path / "checkpoint-7").mkdir()
    torch.save(state, tmp_path / "checkpoint-7" / "model.pth")
    loaded = load_video_align(tmp_path, config(vocab_size=99), torch.float32)  # the file's rows count
    layer, name = (
        loaded.model.language_model.layers[1].self_attn.q_proj,
        "base_model.model.model.layers.1.self_attn.q_proj",
    )
    update = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(layer.weight.data, state[f"{name}.base_layer.weight"] + 2 * update)
    torch.testing.assert_close(layer.bias.data, state[f"{name}.base_layer.bias"])
    torch.testing.assert_close(
        loaded.model.visual.merger.mlp[0].bias.data, state["base_model.model.visual.merger.mlp.0.bias"]
    )
    scorer, fresh = VideoAlign(loaded, tokenizer(), TEMPLATE), model(video_align.head(16))
    fresh.load_state_dict(loaded.state_dict())
    expected = VideoAlign(fresh, tokenizer(), TEMPLATE)(PROMPTS, videos())
    torch.testing.assert_close(scorer(PROMPTS, videos()), expected)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a different 'qwen2_vl': its .*hidden_size is 16, VideoAlign's base"):
        load_reward("video_align", model=tmp_path, base=tmp_path, template=TEMPLATE)
    with pytest.raises(ValueError, match=r"holds neither checkpoint-\*/model.pth nor .* VideoAlign"):
        load_video_align(tmp_path, config(), torch.float32)
    (tmp_path / "checkpoint-7").mkdir()
    state = {name.replace(".base_layer", ""): tensor for name, tensor in published_state().items()}
    torch.save(state, tmp_path / "checkpoint-7" / "model.pth")
    with pytest.raises(
        ValueError, match="model.pth does not hold the weights of VideoAlign: .*base_layer.weight is missing"
    ):
        load_video_align(tmp_path, config(), torch.float32)


def test_what_is_not_here_is_said_with_the_command(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="template: there is no .*none.py; .* `curl --create-dirs -o .*prompt_template.py`"
    ):
        load_reward("video_align", template=tmp_path / "none.py")
    (tmp_path / "other.py").write_text("SIMPLE_PROMPT = 'x'\nraise SystemExit\n")
    with pytest.raises(ValueError, match="other.py does not assign DETAILED_PROMPT_WITH_SPECIAL_TOKEN"):
        load_reward("video_align", template=tmp_path / "other.py")
    (tmp_path / "theirs.py").write_text(f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\nraise SystemExit\n")
    scorer = VideoAlign(model(video_align.head(16)), tokenizer(), tmp_path / "theirs.py")
    assert scorer.template == TEMPLATE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="run `hf download nobody/nothing`"):
        load_reward("video_align", base="nobody/nothing", template=TEMPLATE)


def test_bad_inputs_are_named():
    for template in ("{text_prompt}", TEMPLATE.replace("MQ", "VQ"), TEMPLATE + "<|TA_reward|>"):
        with pytest.raises(
            ValueError, match="template: it must contain {text_prompt} and once each, in order, <|VQ_rew"
        ):
            VideoAlign(model(video_align.head(16)), tokenizer(), template)
    with pytest.raises(ValueError, match="needs at least 2 frames, got 1"):
        reward()(PROMPTS, videos(2, 1))
    with pytest.raises(ValueError, match=r"'a <\|video_pad\|>' contains '<\|video_pad\|>', a special token of video"):
        reward()([f"a {VIDEO}", "b"], videos())
    with pytest.raises(ValueError, match="video_fps=0"):
        reward(video_fps=0)
    with pytest.raises(ValueError, match="tokenizer: it has 23 tokens, the model 20"):
        VideoAlign(model(video_align.head(16), vocab_size=20), tokenizer(), TEMPLATE)
    assert shapes_of(nn.Linear(2, 1).state_dict()) == {"weight": (1, 2), "bias": (1,)}
