"""LAION's aesthetic predictor: how much people like an image, from its CLIP features alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pisces_rl.rewards.offloaded_model import first_device
from pisces_rl.rewards.scorers.frame_scorer import FrameScorer, at_least_float
from pisces_rl.rewards.scorers.published_weights import (
    check_config,
    check_names,
    published_folder,
    read_weights,
    shapes_of,
    stored_shapes,
)

CLIP = "openai/clip-vit-large-patch14"
HEAD = Path("~/.cache/pisces_rl/sac+logos+ava1-l14-linearMSE.safetensors")
#: Sizes that identify CLIP-L/14 among CLIP models.
SIZES = {
    "projection_dim": 768,
    "vision_config.hidden_size": 1024,
    "vision_config.num_hidden_layers": 24,
    "vision_config.patch_size": 14,
    "vision_config.image_size": 224,
}
UNUSED = ("text_model.", "text_projection.", "logit_scale", "embeddings.position_ids")


class AestheticHead(nn.Module):
    """Five linear layers, dropout between the first four, no other nonlinearity: (n, width) -> (n,).

    Layer names follow the checkpoint: layers.0, 2, 4, 6 and 7.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[..., 0]


class AestheticPredictor(FrameScorer):
    """The mean over frames of

        s = head(f / |f|),   f the image features of CLIP-L/14, after its projection

    on the scale of its training data, 1 to 10; it ignores the prompt. Some trainers divide it by 10.

    Args:
        clip: the Hub id or folder of CLIP-L/14, or a CLIPVisionModelWithProjection.
        head: the file written by `pisces-rl convert`, or an AestheticHead.
        frames: frames to score per video.
        micro_batch: frames per forward pass.
        dtype: for a model given by name.
        device: for a model given by name.
        offload: see `FrameScorer`.
        name: see `FrameScorer`.

    A frame is scaled so that its shorter side is 224, cropped at the centre and normalised as in OpenAI's CLIP.
    Source: simple_inference.py of github.com/christophschuhmann/improved-aesthetic-predictor.

    Raises ValueError if the weights are missing or belong to another model.
    """

    crop_rounds = True

    def __init__(
        self,
        clip: str | Path | CLIPVisionModelWithProjection = CLIP,
        head: str | Path | AestheticHead = HEAD,
        *,
        frames: int = 8,
        micro_batch: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        name: str = "aesthetic",
        offload: str | torch.device | None = None,
    ):
        head = head if isinstance(head, AestheticHead) else load_head(head)
        device = first_device(device, offload)
        if not isinstance(clip, CLIPVisionModelWithProjection):
            folder = published_folder(clip, "the aesthetic predictor")
            check_vision_tower(folder)
            clip = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype).to(device)
        width, needs = clip.config.projection_dim, head.layers[0].in_features
        if width != needs:
            raise ValueError(f"clip: its features have {width} numbers, but the head expects {needs}.")
        size = clip.config.image_size
        model = nn.ModuleDict({"clip": clip, "head": head.to(clip.device)})
        super().__init__(model, size=size, frames=frames, micro_batch=micro_batch, name=name, offload=offload)

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Return an empty (B, 0): the prompt is ignored."""
        return torch.empty(len(prompts), 0)

    def look(self, pixels: Tensor, texts: Tensor) -> Tensor:
        features = at_least_float(self.model["clip"](pixel_values=pixels).image_embeds)
        return self.model["head"](F.normalize(features, dim=-1))


def load_head(path: str | Path) -> AestheticHead:
    """Load the head from a file written by `pisces-rl convert`, in fp32."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"head: there is no {path}; convert the published sac+logos+ava1-l14-linearMSE.pth with "
            "`pisces-rl convert aesthetic sac+logos+ava1-l14-linearMSE.pth`."
        )
    return head_of(load_file(path), path)


def read_head(path: Path) -> dict[str, Tensor]:
    """Read the head's weights from safetensors or the pickle, and check names and shapes."""
    state = read_weights(path)
    head_of(state, path)
    return state


def head_of(state: dict[str, Tensor], source: str | Path) -> AestheticHead:
    """Build a head with these weights; raise a ValueError if names or shapes differ."""
    head = AestheticHead()
    check_names(shapes_of(state), shapes_of(head.state_dict()), source, "the aesthetic predictor's head")
    head.load_state_dict(state)
    return head.float()


def check_vision_tower(folder: Path) -> None:
    """Raise a ValueError unless a folder holds all weights of CLIP-L/14's vision tower under their published names."""
    check_config(folder, "the aesthetic predictor's CLIP-L/14", "clip", SIZES)
    with torch.device("meta"):
        config = CLIPVisionConfig.from_pretrained(folder)
        expected = shapes_of(CLIPVisionModelWithProjection(config).state_dict())
    check_names(stored_shapes(folder, "CLIP-L/14"), expected, folder, "CLIP-L/14", UNUSED)
