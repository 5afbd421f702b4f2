"""PickScore: a CLIP-H trained on human choices between two images for a prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from pisces_rl.rewards.encoders.encoder import tokenize
from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.frame_scorer import FrameScorer, at_least_float
from pisces_rl.rewards.scorers.published_weights import (
    check_config,
    check_names,
    published_folder,
    shapes_of,
    stored_shapes,
)

MODEL = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
#: Sizes that identify CLIP-H among CLIP models.
SIZES = {
    "projection_dim": 1024,
    "vision_config.hidden_size": 1280,
    "vision_config.num_hidden_layers": 32,
    "vision_config.patch_size": 14,
    "text_config.hidden_size": 1024,
    "text_config.num_hidden_layers": 24,
}
UNUSED = ("embeddings.position_ids",)  # buffers that transformers stored before 4.31


class PickScore(FrameScorer):
    """The mean over frames of

        s = exp(logit_scale) cos(image, text)

    with CLIP's image and text features. PickScore_v1 gives about 17 to 24; exp(logit_scale) is 100 at most. Some
    trainers divide by 26.

    Args:
        model: the Hub id or folder of PickScore_v1, or a CLIPModel.
        tokenizer: CLIP's, or its Hub id or folder; the authors use that of the CLIP-H they started from.
        frames: frames to score per video.
        micro_batch: frames per forward pass.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `FrameScorer`.
        name: see `FrameScorer`.

    A frame is scaled so that its shorter side is 224, cropped at the centre and normalised as for CLIP. Texts are
    padded, and cut at 77 tokens with a warning. Source: arXiv 2305.01569, and the README of
    github.com/yuvalkirstain/PickScore.

    Raises ValueError if the weights are missing or belong to another model.
    """

    def __init__(
        self,
        model: str | Path | CLIPModel = MODEL,
        tokenizer: str | Path | PreTrainedTokenizerBase = TOKENIZER,
        *,
        frames: int = 8,
        micro_batch: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        name: str = "pickscore",
        offload: str | torch.device | None = None,
    ):
        if not isinstance(model, CLIPModel):
            folder = published_folder(model, "PickScore")
            check_pickscore(folder)
            device = first_device(device, offload)
            model = CLIPModel.from_pretrained(folder, dtype=dtype).to(device)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = AutoTokenizer.from_pretrained(published_folder(tokenizer, "PickScore", ("*.json", "*.txt")))
        self.tokenizer, self.longest = tokenizer, model.config.text_config.max_position_embeddings
        size = model.config.vision_config.image_size
        super().__init__(model, size=size, frames=frames, micro_batch=micro_batch, name=name, offload=offload)

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Return (B, D) text features of length 1."""
        distinct = list(dict.fromkeys(prompts))
        tokens, mask, _, _ = tokenize(self.tokenizer, distinct, self.longest, self.model.device)
        texts = self.model.get_text_features(input_ids=tokens, attention_mask=mask.long()).pooler_output
        return F.normalize(at_least_float(texts), dim=-1)[[distinct.index(prompt) for prompt in prompts]]

    def look(self, pixels: Tensor, texts: Tensor) -> Tensor:
        images = self.model.get_image_features(pixel_values=pixels).pooler_output
        cosine = (F.normalize(at_least_float(images), dim=-1) * texts).sum(-1)
        return at_least_float(self.model.logit_scale).exp() * cosine


def check_pickscore(folder: Path) -> None:
    """Raise a ValueError unless a folder holds a CLIP-H with all weights under their published names."""
    check_config(folder, "PickScore (CLIP-H)", "clip", SIZES)
    with torch.device("meta"):
        expected = shapes_of(CLIPModel(CLIPConfig.from_pretrained(folder)).state_dict())
    check_names(stored_shapes(folder, "PickScore"), expected, folder, "PickScore", UNUSED)
