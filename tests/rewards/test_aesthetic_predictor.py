"""The aesthetic predictor with a tiny random CLIP and a random head; names and shapes against the published ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import TEXT, VISION
from torch.autograd import gradcheck
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from pisces_rl.rewards import RewardPanel
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD
from pisces_rl.rewards.scorers.aesthetic_predictor import (
    SIZES,
    AestheticHead,
    AestheticPredictor,
    check_vision_tower,
    load_head,
)
from pisces_rl.rewards.scorers.frame_scorer import clip_pixels

# of sac+logos+ava1-l14-linearMSE.pth, github.com/christophschuhmann/improved-aesthetic-predictor
PUBLISHED_HEAD = {
    "layers.0.weight": (1024, 768),
    "layers.0.bias": (1024,),
    "layers.2.weight": (128, 1024),
    "layers.2.bias": (128,),
    "layers.4.weight": (64, 128),
    "layers.4.bias": (64,),
    "layers.6.weight": (16, 64),
    "layers.6.bias": (16,),
    "layers.7.weight": (1, 16),
    "layers.7.bias": (1,),
}
# of openai/clip-vit-large-patch14; open_clip lists 303.97 M weights for ViT-L-14's image tower
PUBLISHED_TOWER = {
    "vision_model.embeddings.class_embedding": (1024,),
    "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    "vision_model.embeddings.position_embedding.weight": (257, 1024),
    "vision_model.pre_layrnorm.weight": (1024,),
    "vision_model.encoder.layers.23.self_attn.q_proj.weight": (1024, 1024),
    "vision_model.encoder.layers.23.mlp.fc1.bias": (4096,),
    "vision_model.encoder.layers.23.mlp.fc2.bias": (1024,),
    "vision_model.post_layernorm.weight": (1024,),
    "visual_projection.weight": (768, 1024),
}


def tiny_tower(width: int = 768) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=width))


def head() -> AestheticHead:
    torch.manual_seed(1)
    return AestheticHead()


def videos(count=2, frames=5, height=24, width=20):
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def torchvision_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """What OpenAI's CLIP does with torchvision: Resize (bicubic), CenterCrop, ToTensor, Normalize; on PIL images."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                patch_size=14,
                projection_dim=768,
            )
        ).state_dict()
    assert {name: tuple(tower[name].shape) for name in PUBLISHED_TOWER} == PUBLISHED_TOWER
    assert len(tower) == 24 * 16 + 8 and round(sum(t.numel() for t in tower.values()) / 1e6, 2) == 303.97
    assert {name: tuple(t.shape) for name, t in AestheticHead().state_dict().items()} == PUBLISHED_HEAD


@pytest.mark.parametrize("size", [(24, 20), (19, 40), (16, 16), (13, 31), (16, 19), (96, 64)])
def test_preprocessing_is_that_of_openais_clip(size):
    frames = (videos(1, 2, *size)[0] * 255).round() / 255
    images = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in frames]
    theirs = torch.stack([torchvision_pixels(image, 16) for image in images])
    assert (clip_pixels(frames, 16, crop_rounds=True) - theirs).abs().max() <= 2 / 255 / min(CLIP_STD)


def test_the_score_is_the_authors_formula_and_does_not_read_the_prompt():
    tower, clips = tiny_tower(), videos()
    reward = AestheticPredictor(tower, head(), frames=3, micro_batch=2)
    pixels = clip_pixels(clips[:, [0, 2, 4]].flatten(0, 1), 16, crop_rounds=True)
    features = tower(pixel_values=pixels).image_embeds
    x = features / features.norm(dim=-1, keepdim=True)
    for number in (0, 2, 4, 6, 7):
        layer = reward.model["head"].layers[number]
        x = x @ layer.weight.T + layer.bias
    expected = x[:, 0].view(2, 3).mean(1)
    torch.testing.assert_close(reward(["a", "b"], clips), expected)
    torch.testing.assert_close(reward(["", "c"], clips), expected)
    table = RewardPanel(reward)(["a", "b"], clips, {})
    torch.testing.assert_close(table.values[:, 0], expected)
    assert "aesthetic" in table.seconds


def test_its_gradient_is_the_finite_difference():
    reward = AestheticPredictor(tiny_tower().double(), head().double(), frames=1)
    clip = (0.2 + 0.6 * videos(1, 1, 18, 16).double()).requires_grad_()
    assert gradcheck(lambda x: reward(["a"], x), clip, fast_mode=True, atol=1e-5)


def test_weights_of_another_model_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no .*; convert .* with `pisces-rl convert aesthetic sac"):
        load_head(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="clip: its features have 10 numbers, but the head expects 768"):
        AestheticPredictor(tiny_tower(10), head())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="other is a 'siglip'; the aesthetic predictor's CLIP-L/14 is a 'clip'"):
        AestheticPredictor(tmp_path / "other", head())
    for name in list(SIZES):
        monkeypatch.delitem(SIZES, name)
    tower = tiny_tower()
    tower.vision_model.post_layernorm = torch.nn.Identity()
    tower.save_pretrained(tmp_path / "less")
    config = (tmp_path / "less" / "config.json").read_text().replace('"clip_vision_model"', '"clip"')
    (tmp_path / "less" / "config.json").write_text(config)
    with pytest.raises(
        ValueError, match="does not hold the weights of CLIP-L/14: vision_model.post_layernorm.weight is"
    ):
        check_vision_tower(tmp_path / "less")


def test_the_tower_is_taken_from_the_folder_of_a_whole_clip(tmp_path, monkeypatch):
    for name in list(SIZES):
        monkeypatch.delitem(SIZES, name)
    torch.manual_seed(2)
    vision = VISION | {"projection_dim": 768}
    whole = CLIPModel(CLIPConfig(text_config=TEXT | {"projection_dim": 768}, vision_config=vision, projection_dim=768))
    whole.save_pretrained(tmp_path)
    reward, clips = AestheticPredictor(tmp_path, head(), frames=3, device="cpu"), videos()
    pixels = clip_pixels(clips[:, 2], 16, crop_rounds=True)
    theirs = whole.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(reward.model["clip"](pixel_values=pixels).image_embeds, theirs)
