"""ImageReward with a tiny random BLIP; names and shapes of its weights against the published file."""

import math

import pytest
import torch
from tiny_encoders import tokenizer
from transformers import BlipTextConfig, BlipVisionConfig

from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.scorers.frame_scorer import clip_pixels
from pisces_rl.rewards.scorers.image_reward import (
    MEAN,
    STD,
    WEIGHTS,
    BlipReward,
    ImageReward,
    load_image_reward,
    official_names,
)

PROMPTS = ["a red circle moving left", "a blue square"]
SIZES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
)  # large enough for a gradient far above rounding
TINY = (
    BlipVisionConfig(**SIZES, image_size=16, patch_size=8, layer_norm_eps=1e-6),
    BlipTextConfig(**SIZES, vocab_size=18, encoder_hidden_size=16, max_position_embeddings=40),
)
# of ImageReward.pt in THUDM/ImageReward (fp32)
PUBLISHED = {
    "blip.visual_encoder.cls_token": (1, 1, 1024),
    "blip.visual_encoder.pos_embed": (1, 197, 1024),
    "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
    "blip.visual_encoder.blocks.23.attn.qkv.weight": (3072, 1024),
    "blip.visual_encoder.blocks.0.attn.proj.bias": (1024,),
    "blip.visual_encoder.blocks.0.norm2.weight": (1024,),
    "blip.visual_encoder.blocks.23.mlp.fc1.weight": (4096, 1024),
    "blip.visual_encoder.norm.weight": (1024,),
    "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
    "blip.text_encoder.embeddings.LayerNorm.weight": (768,),
    "blip.text_encoder.encoder.layer.11.attention.self.query.weight": (768, 768),
    "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024),
    "blip.text_encoder.encoder.layer.0.crossattention.output.LayerNorm.bias": (768,),
    "blip.text_encoder.encoder.layer.0.intermediate.dense.weight": (3072, 768),
    "mlp.layers.0.weight": (1024, 768),
    "mlp.layers.7.weight": (1, 16),
}
PUBLISHED_BYTES = 1_786_880_927
PROJECTIONS = 1024 * 256 + 256 + 768 * 256 + 256  # vision_proj and text_proj, which the score does not read


def tiny() -> BlipReward:
    torch.manual_seed(0)
    return BlipReward(*TINY)


def videos(count=2, frames=5, height=24, width=20):
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = BlipReward().state_dict()
    names = official_names(list(state))
    official = {names[name]: tuple(tensor.shape) for name, tensor in state.items()}
    assert {name: official[name] for name in PUBLISHED} == PUBLISHED and len(official) == len(state)
    expected = 4 * (sum(map(math.prod, official.values())) + PROJECTIONS)
    assert 0 < PUBLISHED_BYTES - expected < 400 * (len(official) + 5)  # what the pickle says of each tensor


def test_the_score_is_the_normalised_head_of_the_first_token():
    model, clips = tiny().eval(), videos()
    reward = ImageReward(model, tokenizer(), frames=3, micro_batch=4)
    for prompt, clip, score in zip(PROMPTS, clips, reward(PROMPTS, clips)):
        seen = model.visual_encoder(pixel_values=clip_pixels(clip[[0, 2, 4]], 16, crop_rounds=True)).last_hidden_state
        text = tokenizer()([prompt] * 3, return_tensors="pt")  # without padding
        read = model.text_encoder(
            input_ids=text["input_ids"], attention_mask=text["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        torch.testing.assert_close(score, ((model.mlp(read[:, 0]) - MEAN) / STD).mean(), rtol=1e-4, atol=1e-5)
    changed = reward(PROMPTS[::-1], clips)
    assert (changed - reward(PROMPTS, clips)).abs().min() > 1e-4


def test_later_words_reach_the_first_token():
    """The text tower reads both ways: a decoder's mask would hide the prompt from its first token."""
    reward, clip = ImageReward(tiny(), tokenizer(), frames=1), videos(1).expand(2, -1, -1, -1, -1)
    scores = reward(["a red circle", "a red square"], clip)
    assert (scores[0] - scores[1]).abs() > 1e-4


def test_it_is_a_reward():
    table = RewardPanel(ImageReward(tiny(), tokenizer(), frames=2))(["a red circle", ""], videos(), {})
    assert table.values.isfinite().all() and "image_reward" in table.seconds


def test_its_gradient_is_the_finite_difference():
    reward = ImageReward(tiny().double(), tokenizer(), frames=1)
    clip = (0.2 + 0.6 * videos(1, 1, 16, 16).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(PROMPTS[:1], clip).sum(), clip)
    step = 1e-4 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (reward(PROMPTS[:1], clip + step) - reward(PROMPTS[:1], clip - step)) / 2e-4
    torch.testing.assert_close(slope.item(), gradient.norm().item(), rtol=1e-4, atol=0)


def test_the_published_layout_is_loaded_and_others_are_refused(tmp_path):
    source = tiny()
    names = official_names(list(source.state_dict()))
    state = {names[name]: tensor for name, tensor in source.state_dict().items()}
    unread = {
        "blip.vision_proj.weight": torch.zeros(4, 16),
        "blip.text_encoder.embeddings.position_ids": torch.zeros(1),
    }
    torch.save(state | unread, tmp_path / WEIGHTS)
    loaded = load_image_reward(tmp_path, *TINY, torch.float32)
    expected = ImageReward(source, tokenizer(), frames=2)(PROMPTS, videos())
    torch.testing.assert_close(ImageReward(loaded, tokenizer(), frames=2)(PROMPTS, videos()), expected)
    with pytest.raises(ValueError, match="ImageReward.pt does not hold the weights of ImageReward: .* is missing"):
        load_reward("image_reward", model=tmp_path, device="cpu")
    del state["blip.visual_encoder.cls_token"]
    torch.save(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="blip.visual_encoder.cls_token is missing"):
        load_image_reward(tmp_path, *TINY, torch.float32)
    with pytest.raises(ValueError, match="holds neither ImageReward.pt"):
        load_image_reward(tmp_path / "..", *TINY, torch.float32)
