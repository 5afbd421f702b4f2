"""Prompts as a `datasets.Dataset`, ready for a trainer."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import torch

from .grammar import Scene
from .renderer import render_layout
from .splits import family_of, sample_layouts

_TEXT, _TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))
_FEATURES = datasets.Features(
    {
        "prompt": _TEXT,
        "split": _TEXT,
        "family": _TEXT,
        "shapes": _TEXTS,
        "counts": datasets.List(datasets.Value("int64")),
        "sizes": _TEXTS,
        "colors": _TEXTS,
        "motions": _TEXTS,
        "speeds": _TEXTS,
        "relation": _TEXT,
        "background": _TEXT,
    }
)


def load_prompts(split: str, n: int, seed: int = 0, families: Sequence[str] | None = None) -> datasets.Dataset:
    """Draw n prompts of one split; the same arguments give the same prompts, and each can be rendered.

    Args:
        split: one of `SPLITS`: "train", "test_seen", "test_color_shape", "test_shape_motion", "test_both".
        n: number of prompts, at least 1. Prompts may repeat: there are only four of the kind "a circle".
        seed: seed of the draw.
        families: names of `FAMILIES` that the split has; None draws uniformly from all of them.

    Returns:
        A dataset with the column `prompt` and its content: `split`, `family`, the lists `shapes`, `counts`, `sizes`,
        `colors`, `motions`, `speeds` with one entry per group, `relation` and `background`. None means that the
        prompt does not name the attribute.

    Raises:
        ValueError: an unknown split or family (the nearest name is suggested), or n below 1.
    """
    scenes = sample_layouts(n, split, families, torch.Generator().manual_seed(seed))[0].scenes()
    return datasets.Dataset.from_list([_row(scene, split) for scene in scenes], features=_FEATURES)


class Clips(torch.utils.data.Dataset):
    """Captioned clips rendered on access: rows {"prompt", "video" (F, 3, size, size) in [0, 1]}.

    Args:
        split: as in `load_prompts`, which draws the same scenes.
        n: as in `load_prompts`.
        seed: as in `load_prompts`.
        size: height and width of a clip in pixels.
        num_frames: frames per clip.
    """

    def __init__(self, split: str, n: int, seed: int = 0, size: int = 64, num_frames: int = 17):
        specs, self.layout = sample_layouts(n, split, None, torch.Generator().manual_seed(seed))
        self.prompts = [scene.prompt() for scene in specs.scenes()]
        self.size, self.num_frames = size, num_frames

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> dict:
        (video,) = render_layout(self.layout[[row]], self.size, self.num_frames)
        return {"prompt": self.prompts[row], "video": video}


def _row(scene: Scene, split: str) -> dict:
    groups = scene.groups
    return {
        "prompt": scene.prompt(),
        "split": split,
        "family": family_of(scene),
        "shapes": [group.shape for group in groups],
        "counts": [group.count for group in groups],
        "sizes": [group.size for group in groups],
        "colors": [group.color for group in groups],
        "motions": [group.motion for group in groups],
        "speeds": [group.speed for group in groups],
        "relation": scene.relation,
        "background": scene.background,
    }
