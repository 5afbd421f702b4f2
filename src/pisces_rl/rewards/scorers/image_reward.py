"""ImageReward: human preference between images for a prompt, by BLIP with a head on its text tower."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip_text import BlipTextModel

from pisces_rl.rewards.encoders.encoder import tokenize
from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.aesthetic_predictor import AestheticHead
from pisces_rl.rewards.scorers.frame_scorer import FrameScorer, at_least_float
from pisces_rl.rewards.scorers.published_weights import (
    check_names,
    published_folder,
    read_weights,
    shapes_of,
    weights_file,
)

MODEL, TOKENIZER, WEIGHTS = "THUDM/ImageReward", "google-bert/bert-base-uncased", "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # the authors' normalisation
LONGEST = 35  # tokens in a prompt
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "embeddings.position_ids")
VISION = BlipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
)
TEXT = BlipTextConfig(
    vocab_size=30524,
    hidden_size=768,
    encoder_hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
)
#: transformers' names of the vision tower, and the published names after `blip.visual_encoder.`
RENAMED = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "post_layernorm.": "norm.",
    "encoder.layers.": "blocks.",
    "self_attn.qkv.": "attn.qkv.",
    "self_attn.projection.": "attn.proj.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
}


class BlipReward(nn.Module):
    """BLIP's vision tower, its text tower attending to it, and the head on the first token: (n,) raw scores."""

    def __init__(self, vision: BlipVisionConfig = VISION, text: BlipTextConfig = TEXT):
        super().__init__()
        self.visual_encoder, self.text_encoder = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.mlp = AestheticHead(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.visual_encoder(pixel_values=pixels).last_hidden_state
        read = self.text_encoder(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return self.mlp(at_least_float(read[:, 0]))


class ImageReward(FrameScorer):
    """The mean over frames of (head(h) - mean) / std, roughly standard normal over the authors' data.

    h is the first token of BLIP's text tower, which reads the prompt and attends to the image; mean and std are the
    authors' constants. A frame is scaled so that its shorter side is 224, cropped at the centre and normalised as for
    CLIP. Prompts are padded to 35 tokens, and cut there with a warning. Source: arXiv 2304.05977, ImageReward.py of
    github.com/THUDM/ImageReward.

    Args:
        model: the Hub id, a folder or the file of the weights: ImageReward.pt, which is read with `weights_only`, or
            ImageReward.safetensors, written by `pisces-rl convert` and preferred; or a BlipReward.
        tokenizer: BERT's (uncased), or its Hub id or folder.
        frames: frames to score per video.
        micro_batch: frames per forward pass.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `FrameScorer`.
        name: see `FrameScorer`.

    Raises ValueError if the weights are missing or belong to another model.
    """

    crop_rounds = True

    def __init__(
        self,
        model: str | Path | BlipReward = MODEL,
        tokenizer: str | Path | PreTrainedTokenizerBase = TOKENIZER,
        *,
        frames: int = 8,
        micro_batch: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        name: str = "image_reward",
        offload: str | torch.device | None = None,
    ):
        if not isinstance(model, BlipReward):
            device = first_device(device, offload)
            model = load_image_reward(model, VISION, TEXT, dtype).to(device)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = AutoTokenizer.from_pretrained(published_folder(tokenizer, "ImageReward", ("*.json", "*.txt")))
        self.tokenizer = tokenizer
        size = model.visual_encoder.config.image_size
        super().__init__(model, size=size, frames=frames, micro_batch=micro_batch, name=name, offload=offload)

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Return token numbers and mask, (B, 2, 35)."""
        device = next(self.model.parameters()).device
        tokens, mask, _, _ = tokenize(self.tokenizer, prompts, LONGEST, device, fixed=True)
        return torch.stack([tokens, mask.long()], 1)

    def look(self, pixels: Tensor, texts: Tensor) -> Tensor:
        return (self.model(pixels, texts[:, 0], texts[:, 1]) - MEAN) / STD


def official_names(names: Sequence[str]) -> dict[str, str]:
    """Return the published name of each weight of a `BlipReward`."""
    found = {}
    for name in names:
        official = name if name.startswith("mlp.") else f"blip.{name}"
        if name.startswith("visual_encoder."):
            for own, theirs in RENAMED.items():
                official = official.replace(own, theirs, 1)
        found[name] = official
    return found


def read_image_reward(path: Path, vision: BlipVisionConfig, text: BlipTextConfig) -> dict[str, Tensor]:
    """Read the weights of a file under their published names and check names and shapes."""
    state = read_weights(path)
    with torch.device("meta"):
        own = shapes_of(BlipReward(vision, text).state_dict())
    names = official_names(list(own))
    check_names(shapes_of(state), {names[k]: v for k, v in own.items()}, path, "ImageReward", UNUSED)
    return state


def load_image_reward(
    source: str | Path, vision: BlipVisionConfig, text: BlipTextConfig, dtype: torch.dtype
) -> BlipReward:
    """Load the model from a file, folder or Hub id of ImageReward's weights, after checking names and shapes."""
    state = read_image_reward(weights_file(source, "ImageReward", WEIGHTS), vision, text)
    with init_empty_weights(include_buffers=False):
        model = BlipReward(vision, text)
    names = official_names(list(model.state_dict()))
    model.load_state_dict({name: state[names[name]].to(dtype) for name in names}, assign=True)
    model.mlp.float()
    return model
