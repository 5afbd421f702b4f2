"""PickScore with a tiny random CLIP; names and shapes of its weights against the published ones."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import TEXT, VISION, tokenizer
from torch.autograd import gradcheck
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD
from pisces_rl.rewards.scorers.frame_scorer import clip_pixels, spread
from pisces_rl.rewards.scorers.pickscore import SIZES, PickScore, check_pickscore

PROMPTS = ["a red circle moving left", "a blue square"]

# config.json and the names of the CLIP-H that PickScore_v1 was trained from, laion/CLIP-ViT-H-14-laion2B-s32B-b79K in
# the layout of transformers; 986.11 M weights as open_clip lists for ViT-H-14 (docs/model_profile.csv).
CLIP_H = dict(
    projection_dim=1024,
    vision_config=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    ),
    text_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"
    ),
)
PUBLISHED = {
    "logit_scale": (),
    "text_model.embeddings.token_embedding.weight": (49408, 1024),
    "text_model.embeddings.position_embedding.weight": (77, 1024),
    "text_model.encoder.layers.23.self_attn.q_proj.weight": (1024, 1024),
    "text_model.encoder.layers.23.layer_norm2.bias": (1024,),
    "text_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    "text_model.final_layer_norm.weight": (1024,),
    "vision_model.embeddings.class_embedding": (1280,),
    "vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
    "vision_model.embeddings.position_embedding.weight": (257, 1280),
    "vision_model.pre_layrnorm.weight": (1280,),
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": (1280, 1280),
    "vision_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280),
    "vision_model.encoder.layers.31.mlp.fc2.weight": (1280, 5120),
    "vision_model.post_layernorm.weight": (1280,),
    "visual_projection.weight": (1024, 1280),
    "text_projection.weight": (1024, 1024),
}


def tiny_clip(**changes) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION | changes, projection_dim=10))


def videos(count=2, frames=5, height=24, width=20):
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def byte_images(clip: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in clip]


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = CLIPModel(CLIPConfig(**CLIP_H)).state_dict()
    assert {name: tuple(state[name].shape) for name in PUBLISHED} == PUBLISHED
    assert len(state) == 24 * 16 + 32 * 16 + 4 + 7 + 3  # 16 a layer, embeddings and norms, projections and scale
    assert round(sum(math.prod(tensor.shape) for tensor in state.values()) / 1e6, 2) == 986.11


@pytest.mark.parametrize("size", [(24, 20), (19, 40), (16, 16), (13, 31), (96, 64)])
def test_preprocessing_is_the_processors(size):
    frames = (videos(1, 3, *size)[0] * 255).round() / 255
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    theirs = torch.as_tensor(np.stack(processor(byte_images(frames))["pixel_values"]))
    ours = clip_pixels(frames, 16)
    assert tuple(processor.image_mean) == CLIP_MEAN and tuple(processor.image_std) == CLIP_STD
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 2 / 255 / min(CLIP_STD)


def test_the_score_is_the_authors_formula():
    model, clips = tiny_clip(), (videos() * 255).round() / 255
    reward = PickScore(model, tokenizer(), frames=3, micro_batch=4)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for prompt, clip, score in zip(PROMPTS, clips, reward(PROMPTS, clips)):
        pixels = torch.as_tensor(np.stack(processor(byte_images(clip[[0, 2, 4]]))["pixel_values"]))
        out = model(**tokenizer()(prompt, return_tensors="pt"), pixel_values=pixels)
        torch.testing.assert_close(score, out.logits_per_image.mean(), rtol=0, atol=0.05)


def test_it_is_a_reward():
    reward = PickScore(tiny_clip(), tokenizer(), frames=3)
    table = RewardPanel(reward)(["a red circle", "", "a red circle"], videos(3), {})
    assert table.values.shape == (3, 1) and table.values.isfinite().all() and "pickscore" in table.seconds
    assert reward.differentiable and not reward(PROMPTS, videos()).requires_grad


def test_batch_mates_and_micro_batches_change_nothing():
    reward, clips = PickScore(tiny_clip(), tokenizer(), frames=3, micro_batch=2), videos(3)
    prompts = [*PROMPTS, "a cross moving right on black two squares"]
    alone = torch.cat([reward([prompt], clip[None]) for prompt, clip in zip(prompts, clips)])
    torch.testing.assert_close(reward(prompts, clips), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(PickScore(tiny_clip(), tokenizer(), frames=3)(prompts, clips), alone)


def test_frames_are_spread():
    assert spread(9, 3).tolist() == [0, 4, 8] and spread(2, 8).tolist() == [0, 1] and spread(1, 4).tolist() == [0]


def test_its_gradient_is_the_finite_difference():
    reward = PickScore(tiny_clip().double(), tokenizer(), frames=1)
    reward.model.logit_scale.fill_(0.0)
    clip = (0.2 + 0.6 * videos(1, 1, 18, 16).double()).requires_grad_()
    assert gradcheck(lambda x: reward(PROMPTS[:1], x), clip, fast_mode=True, atol=1e-4)


def test_weights_of_another_model_are_refused_by_name(tmp_path, monkeypatch):
    model = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"is a different 'clip': its projection_dim is 10, PickScore .* has 1024"):
        load_reward("pickscore", model=tmp_path / "clip")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"bert is a 'bert'; PickScore \(CLIP-H\) is a 'clip'"):
        PickScore(tmp_path / "bert")
    for name in list(SIZES):
        monkeypatch.delitem(SIZES, name)
    model.vision_model.pre_layrnorm = torch.nn.Identity()
    model.save_pretrained(tmp_path / "less")
    with pytest.raises(
        ValueError, match=r"less does not hold .* PickScore: vision_model.pre_layrnorm.weight is missing"
    ):
        check_pickscore(tmp_path / "less")


def test_a_folder_is_loaded(tmp_path, monkeypatch):
    for name in list(SIZES):
        monkeypatch.delitem(SIZES, name)
    model = tiny_clip()
    model.save_pretrained(tmp_path)
    reward = load_reward("pickscore", model=tmp_path, tokenizer=tokenizer(), frames=3, device="cpu")
    torch.testing.assert_close(reward(PROMPTS, videos()), PickScore(model, tokenizer(), frames=3)(PROMPTS, videos()))


def test_it_waits_on_the_cpu_between_calls(monkeypatch):
    reward, places = PickScore(tiny_clip(), tokenizer(), frames=3), []
    monkeypatch.setattr(reward.model, "to", lambda place: places.append(place) or reward.model)
    reward.offload = "cpu"
    reward(PROMPTS, videos())
    assert places == ["cpu"] * 3
    reward(PROMPTS, videos().requires_grad_()).sum().backward()  # the graph needs the weights where they are
    assert places == ["cpu"] * 4


def test_what_is_not_here_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="PickScore needs 'nobody/nothing', .* run `hf download nobody/nothing`"):
        load_reward("pickscore", model="nobody/nothing")
    with pytest.raises(ValueError, match="'pickscore' does not use encoder, plan; it takes model, tokenizer, frames"):
        load_reward("pickscore", encoder="x", plan="full")
    with pytest.raises(ValueError, match="frames=0"):
        PickScore(tiny_clip(), tokenizer(), frames=0)
    with pytest.raises(ValueError, match="video 0 has values"):
        PickScore(tiny_clip(), tokenizer())(PROMPTS, videos() * 255)
