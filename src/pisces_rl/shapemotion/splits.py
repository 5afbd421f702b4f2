"""Training and test splits of prompts, and how they are drawn.

| split | its prompts |
|---|---|
| `train` | no held-out pair, and not in `test_seen` |
| `test_seen` | no held-out pair; a third of those prompts, chosen by a hash of the scene, never drawn for `train` |
| `test_color_shape` | a held-out pair of color and shape (a red triangle), none of shape and motion |
| `test_shape_motion` | a held-out pair of shape and motion (a circle moving up), none of color and shape |
| `test_both` | both |

All splits are disjoint. The four prompts that name only a shape ("a circle") are too few to divide: all are in
`train`, and `test_seen` has no family `object_class`.

The shipped tiny-wan was pretrained before the hash existed, so its pretraining includes prompts of `test_seen`; only
RL runs never see them. Its pretraining never saw the held-out pairs, in words or in pixels.

A family is the subject of a prompt: one per dimension of the verifier, and `full`, which combines nearly all. Scenes
are drawn with a uniform family, then uniform words, and redrawn until the split is right and a layout is legal.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from .grammar import Scene
from .layout import Layout, try_layout
from .specs import SceneSpecs

FAMILIES = (
    "object_class",
    "color",
    "count",
    "motion",
    "speed",
    "size",
    "scene",
    "multiple_objects",
    "spatial_relationship",
    "full",
)
#: The families that each split has.
SPLITS = {
    "train": FAMILIES,
    "test_seen": FAMILIES[1:],
    "test_color_shape": FAMILIES[1:],
    "test_shape_motion": ("motion", "speed", "full"),
    "test_both": ("motion", "speed", "full"),
}
_TEST_SEEN_ONE_IN = 3


def split_of(scene: Scene) -> str:
    """Return the split of a scene, which depends only on its prompt."""
    return list(SPLITS)[int(split_index(SceneSpecs.from_scenes([scene])))]


def family_of(scene: Scene) -> str:
    """Return the family that would draw a scene, or the nearest one."""
    group = scene.groups[0]
    if len(scene.groups) == 2:
        if scene.background or any(g.size or g.motion or g.count > 1 for g in scene.groups):
            return "full"
        return "multiple_objects" if scene.relation == "and" else "spatial_relationship"
    said = {
        "scene": scene.background,
        "size": group.size,
        "speed": group.speed,
        "motion": group.motion,
        "count": group.count > 1,
        "color": group.color,
    }
    return next((family for family, word in said.items() if word), "object_class")


def sample_scenes(n: int, split: str = "train", seed: int = 0, family: str | None = None) -> list[Scene]:
    """Draw n scenes of one split that can be rendered; the same seed gives the same scenes. Scenes may repeat.

    Args:
        n: how many, at least 1.
        split: one of `SPLITS`.
        seed: of the draw.
        family: one of the split's families; None draws from all of them.

    Raises:
        ValueError: an unknown split or family (the nearest name is suggested), or n below 1.
    """
    families = None if family is None else (family,)
    return sample_layouts(n, split, families, torch.Generator().manual_seed(seed))[0].scenes()


def sample_layouts(
    n: int,
    split: str = "train",
    families: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[SceneSpecs, Layout]:
    """Draw n scenes of one split together with a legal layout of each, on the generator's device.

    Args:
        n: how many, at least 1.
        split: one of `SPLITS`.
        families: names of the split's families; None draws from all of them.
        generator: decides the draw and the device (CPU without one).

    Raises:
        ValueError: an unknown split or family (the nearest name is suggested), or n below 1.
    """
    families = check_split(split, families)
    if n < 1:
        raise ValueError(f"n={n!r}; allowed: 1 or more.")
    index = list(SPLITS).index(split)
    device = generator.device if generator is not None else torch.device("cpu")
    choices = torch.tensor([FAMILIES.index(name) for name in families], device=device)
    family = choices[torch.randint(0, len(choices), (n,), device=device, generator=generator)]
    specs = _propose(family, generator)
    layout, legal = try_layout(specs, generator)
    layout = layout.with_slots(3)
    legal &= split_index(specs) == index
    # redraw a rejected scene in the same family, so that rejection does not change the mix of families
    while len(rows := (~legal).nonzero()[:, 0]):
        proposed = _propose(family[rows], generator)
        inside = split_index(proposed) == index
        rows, proposed = rows[inside], proposed[inside]
        if not len(rows):
            continue
        again, legal[rows] = try_layout(proposed, generator)
        layout.set(rows, again.with_slots(3))
        specs.set(rows, proposed)
    return specs, layout


def check_split(split: str, families: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the families to draw from.

    Raises:
        ValueError: an unknown split, or a family that the split does not have.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown{_nearest(split, SPLITS)} allowed: {', '.join(SPLITS)}.")
    if families is None:
        return SPLITS[split]
    if isinstance(families, str) or not len(families):
        raise ValueError(f"families={families!r}; allowed: a list such as ['color', 'motion'], or None for all.")
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"families has {family!r}{_nearest(family, FAMILIES)} allowed: {', '.join(FAMILIES)}.")
        if family not in SPLITS[split]:
            raise ValueError(
                f"families has {family!r}, which split {split!r} does not have; allowed: {', '.join(SPLITS[split])}."
            )
    return tuple(families)


def _nearest(name: str, names: Sequence[str]) -> str:
    match = difflib.get_close_matches(str(name), list(names), 1, 0.4)
    return f"; did you mean {match[0]!r}?" if match else ";"


def split_index(specs: SceneSpecs) -> torch.Tensor:
    """Return (N,) indices into `SPLITS`."""
    color_shape, shape_motion = specs.held_out()
    bare = (specs.color < 0) & (specs.size < 0) & (specs.motion < 0)
    bare = bare[:, 0] & (specs.count[:, 0] == 1) & (specs.shape[:, 1] < 0) & (specs.background < 0)
    seen = torch.where(bare, 0, (specs.hash() % _TEST_SEEN_ONE_IN == 0).long())
    return torch.where(color_shape, torch.where(shape_motion, 4, 2), torch.where(shape_motion, 3, seen))


def _propose(family: torch.Tensor, generator: torch.Generator | None) -> SceneSpecs:
    """Draw scenes of any split with uniform words for each family's attributes; family: (N,) index into `FAMILIES`."""
    n, device = len(family), family.device

    def choose(number, *shape):
        return torch.randint(0, number, shape or (n,), device=device, generator=generator)

    def says(*names):
        return torch.isin(family, torch.tensor([FAMILIES.index(name) for name in names], device=device))

    two, full = says("multiple_objects", "spatial_relationship", "full"), says("full")
    none = torch.full((n,), -1, device=device)

    def column(first, second):  # (n, 2): a value per group, -1 for a missing group
        return torch.stack([first, torch.where(two, second, -1)], 1)

    color = choose(6)
    direction, other_direction, any_motion = choose(5), choose(5), choose(7)
    motion = torch.where(says("motion"), any_motion, torch.where(says("speed"), 1 + choose(4), none))
    motion = torch.where(full, direction, motion)
    other_motion = torch.where(choose(2) == 0, direction, other_direction)
    relation = torch.where(says("multiple_objects"), 0, torch.where(says("spatial_relationship"), 1 + choose(4), none))
    return SceneSpecs(
        shape=column(choose(4), choose(4)),
        count=torch.stack([torch.where(says("count"), 2 + choose(2), 1), two.long()], 1),
        size=column(torch.where(says("size") | full, choose(2), none), torch.where(full, choose(2), none)),
        color=column(torch.where(says("object_class"), none, color), (color + 1 + choose(5)) % 6),
        motion=column(motion, torch.where(full, other_motion, none)),
        speed=column(torch.where(says("speed"), choose(2), none), none),
        relation=torch.where(full, choose(5), relation),
        background=torch.where(says("scene") | full, choose(3), none),
    )
