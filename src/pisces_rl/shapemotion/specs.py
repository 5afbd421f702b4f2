"""A batch of scenes as integer tensors on any device, for sampling and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .grammar import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_COLOR_SHAPE,
    HELD_OUT_SHAPE_MOTION,
    MOTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Group,
    Scene,
)

#: (4 shapes, 6 colors) and (4 shapes, 7 motions): True for pairs that training must never see.
HELD_OUT_COLORS_OF_SHAPE = torch.tensor([[(c, s) in HELD_OUT_COLOR_SHAPE for c in COLORS] for s in SHAPES])
HELD_OUT_MOTIONS_OF_SHAPE = torch.tensor([[(s, m) in HELD_OUT_SHAPE_MOTION for m in MOTIONS] for s in SHAPES])


@dataclass
class SceneSpecs:
    """N scenes; all fields are int64 tensors on one device, and -1 means that the prompt does not name the attribute.

    Attributes:
        shape, size, color, motion, speed: (N, 2), indices into `SHAPES`, `SIZES`, ... in grammar.py, one column per
            group. `shape` is -1 if there is no second group.
        count: (N, 2), objects in the group: 1 to 3, or 0 if there is no second group.
        relation: (N,), index into `RELATIONS`, -1 with one group.
        background: (N,), index into `BACKGROUNDS`.
    """

    shape: torch.Tensor
    count: torch.Tensor
    size: torch.Tensor
    color: torch.Tensor
    motion: torch.Tensor
    speed: torch.Tensor
    relation: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows) -> SceneSpecs:
        return SceneSpecs(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def set(self, rows: torch.Tensor, other: SceneSpecs) -> None:
        """Replace the given rows."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)

    def to(self, device) -> SceneSpecs:
        return SceneSpecs(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @staticmethod
    def cat(parts: Sequence[SceneSpecs]) -> SceneSpecs:
        return SceneSpecs(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(SceneSpecs)})

    @staticmethod
    def from_scenes(scenes: Sequence[Scene], device="cpu") -> SceneSpecs:
        """Convert a list of scenes to tensors."""
        none = (-1, 0, -1, -1, -1, -1)
        rows = [[_group_row(g) for g in scene.groups] + [none] * (2 - len(scene.groups)) for scene in scenes]
        table = torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 2, 6).unbind(-1)
        relation = torch.tensor([_index(RELATIONS, scene.relation) for scene in scenes], device=device).long()
        background = torch.tensor([_index(BACKGROUNDS, scene.background) for scene in scenes], device=device).long()
        return SceneSpecs(*table, relation, background)

    def scenes(self) -> list[Scene]:
        """Convert the tensors to scenes; the inverse of `from_scenes`."""
        columns = (self.shape, self.count, self.size, self.color, self.motion, self.speed)
        rows = torch.stack(columns, -1).tolist()
        return [
            Scene(tuple(_group(*g) for g in groups if g[0] >= 0), _word(RELATIONS, relation), _word(BACKGROUNDS, b))
            for groups, relation, b in zip(rows, self.relation.tolist(), self.background.tolist(), strict=True)
        ]

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two (N,) bool: whether a held-out pair of color and shape, or of shape and motion, is named."""
        shape = self.shape.clamp(min=0)
        colors, motions = HELD_OUT_COLORS_OF_SHAPE.to(shape.device), HELD_OUT_MOTIONS_OF_SHAPE.to(shape.device)
        color_shape = colors[shape, self.color.clamp(min=0)] & (self.color >= 0)
        shape_motion = motions[shape, self.motion.clamp(min=0)] & (self.motion >= 0)
        return color_shape.any(1), shape_motion.any(1)

    def hash(self) -> torch.Tensor:
        """(N,) int64 in [0, 2**32): a hash of the scene, and so of the prompt, equal on all devices."""
        code = (self.relation + 1) * 4 + self.background + 1
        for g in range(2):
            for value, radix in (
                (self.shape[:, g] + 1, 5),
                (self.count[:, g], 4),
                (self.size[:, g] + 1, 3),
                (self.color[:, g] + 1, 7),
                (self.motion[:, g] + 1, 8),
                (self.speed[:, g] + 1, 3),
            ):
                code = code * radix + value
        # a code fits in 32 bits and the factors in 31, so no product leaves int64 and every device agrees
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            code = ((code ^ (code >> shift)) * factor) & 0xFFFFFFFF
        return code ^ (code >> 15)


def _index(words: tuple[str, ...], word: str | None) -> int:
    return -1 if word is None else words.index(word)


def _word(words: tuple[str, ...], index: int) -> str | None:
    return None if index < 0 else words[index]


def _group_row(group: Group) -> tuple[int, ...]:
    attributes = ((SIZES, group.size), (COLORS, group.color), (MOTIONS, group.motion), (SPEEDS, group.speed))
    return (SHAPES.index(group.shape), group.count, *(_index(words, word) for words, word in attributes))


def _group(shape: int, count: int, size: int, color: int, motion: int, speed: int) -> Group:
    return Group(
        SHAPES[shape], count, _word(SIZES, size), _word(COLORS, color), _word(MOTIONS, motion), _word(SPEEDS, speed)
    )
