"""Lay out the objects of scenes: draw the attributes that a prompt does not name, and positions until they are legal.

Lengths are in units: a frame is 32 units wide at any resolution, and unit 0 is the center of the first of 32 columns.
Time runs from 0 to 16 over a clip with any number of frames, so a speed of 0.9 units per 1/16 clip is 0.9 units per
frame in a clip of 17 frames.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from .grammar import BACKGROUNDS
from .specs import HELD_OUT_COLORS_OF_SHAPE, HELD_OUT_MOTIONS_OF_SHAPE, SceneSpecs

UNITS = 32
DURATION = 16.0
RADII = (2.8, 4.8)  # small, large: radius of the circle of equal area
SPEED_OF_WORD = (0.35, 0.9)  # slowly, quickly
GROWTH = 1.8  # last radius over first radius of a growing shape, and its inverse for a shrinking one
DIRECTIONS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0))  # of `MOTIONS`; y points down
REACH = (1.0, 1.2533, 1.5551, 1.2533)  # of `SHAPES`: radius of the circumscribed circle over the shape's radius

_GROWING, _SHRINKING = 5, 6
_CANDIDATES = 64  # positions tried per round
_ROUNDS = 200  # only rare scenes that barely fit need many
_ROWS = 4096  # scenes laid out at once, to limit memory


@dataclass
class Layout:
    """N clips of at most K objects, for rendering at any size and number of frames.

    Attributes:
        present: (N, K) bool.
        shape, color: (N, K) indices into `SHAPES` and `COLORS`.
        motion: (N, K) index into `MOTIONS`.
        radius: (N, K) first radius in units.
        growth: (N, K) last radius over first.
        start: (N, K, 2) first center (x, y).
        velocity: (N, K, 2) in units per 1/16 clip.
        background: (N,) index into `BACKGROUNDS`.
    """

    present: torch.Tensor
    shape: torch.Tensor
    color: torch.Tensor
    motion: torch.Tensor
    radius: torch.Tensor
    growth: torch.Tensor
    start: torch.Tensor
    velocity: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, rows) -> Layout:
        return Layout(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def set(self, rows: torch.Tensor, other: Layout) -> None:
        """Replace the given rows."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)

    def with_slots(self, slots: int) -> Layout:
        """The same layouts with room for `slots` objects."""
        missing = slots - self.present.shape[1]
        pad = {
            f.name: torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1) if x.ndim > 1 else x
            for f in fields(self)
            for x in (getattr(self, f.name),)
        }
        return Layout(**pad)

    @staticmethod
    def cat(parts: list[Layout]) -> Layout:
        slots = max(part.present.shape[1] for part in parts)
        parts = [part.with_slots(slots) for part in parts]
        return Layout(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Layout)})


def lay_out(specs: SceneSpecs, generator: torch.Generator | None = None) -> Layout:
    """Return a legal layout per scene: inside the frame, no overlap, and the relation holds in all frames.

    Randomly drawn attributes never form a held-out pair.

    Raises:
        ValueError: a scene has no legal layout; the message names its prompt.
    """
    layout, legal = search_layout(specs, generator)
    if not legal.all():
        prompt = specs[(~legal).nonzero()[:1, 0]].scenes()[0].prompt()
        raise ValueError(
            f"prompt={prompt!r} has no layout in which its objects fit the frame, do not touch and keep their "
            "relation; ask for fewer or smaller objects, or for slower motion."
        )
    return layout


def search_layout(specs: SceneSpecs, generator: torch.Generator | None = None) -> tuple[Layout, torch.Tensor]:
    """Repeat `try_layout` until all scenes have a legal layout or the rounds run out; return layouts, (N,) legal."""
    parts = []
    for first in range(0, len(specs), _ROWS):
        chunk = specs[first : first + _ROWS]
        layout, legal = try_layout(chunk, generator)
        for _ in range(_ROUNDS):
            rows = (~legal).nonzero()[:, 0]
            if not len(rows):
                break
            again, legal[rows] = try_layout(chunk[rows], generator)
            layout.set(rows, again.with_slots(layout.present.shape[1]))
        parts.append((layout, legal))
    return Layout.cat([layout for layout, _ in parts]), torch.cat([legal for _, legal in parts])


def try_layout(specs: SceneSpecs, generator: torch.Generator | None = None) -> tuple[Layout, torch.Tensor]:
    """Run one round of rejection sampling; return the layouts, and (N,) bool, whether a legal one was found."""
    layout, group = _fill(specs, generator)
    present, slots = layout.present, layout.present.shape[1]
    lowest, highest = _reach(layout)
    legal = ((highest >= lowest).all(-1) | ~present).all(1)

    def draw(rows, candidates):
        shape = (len(rows), candidates, slots, 2)
        u = torch.rand(shape, device=present.device, generator=generator)
        return lowest[rows, None] + u * (highest - lowest).clamp(min=0)[rows, None]

    alone = present.sum(1) == 1
    layout.start[alone] = draw(alone.nonzero()[:, 0], 1)[:, 0]
    rows = (~alone).nonzero()[:, 0]
    if len(rows):
        starts = draw(rows, _CANDIDATES)
        good = _apart(layout[rows], starts) & _related(specs.relation[rows], layout[rows], group[rows], starts)
        pick = good.float().argmax(1)
        layout.start[rows] = starts[torch.arange(len(rows), device=pick.device), pick]
        legal[rows] &= good.any(1)
    return layout, legal


def _fill(specs: SceneSpecs, generator: torch.Generator | None) -> tuple[Layout, torch.Tensor]:
    """Draw attributes that prompts do not name; return layouts without positions, and (N, K) each object's group."""
    n, device = len(specs), specs.shape.device

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, device=device, generator=generator)

    def choose(allowed):  # a uniform choice among the True entries of the last axis
        return (uniform(0.01, 1, *allowed.shape) * allowed).argmax(-1)

    shape = specs.shape.clamp(min=0)
    color = choose(~HELD_OUT_COLORS_OF_SHAPE.to(device)[shape])
    color = torch.where(specs.color < 0, color, specs.color)
    plain = torch.arange(7, device=device) < _GROWING  # a motion that is not named never changes the size
    motion = choose(~HELD_OUT_MOTIONS_OF_SHAPE.to(device)[shape] & plain)
    motion = torch.where(specs.motion < 0, motion, specs.motion)
    growing, shrinking = motion == _GROWING, motion == _SHRINKING

    total = specs.count.sum(1)
    size = torch.where(specs.size < 0, choose(torch.ones(n, 2, 2, dtype=torch.bool, device=device)), specs.size)
    size = torch.where(
        (specs.size < 0) & (total > 2)[:, None], 0, size
    )  # three or more objects are small unless a size is named
    radius = torch.tensor(RADII, device=device)[size] * uniform(0.92, 1.08, n, 2)
    # a growing or shrinking shape goes between the two sizes, or beyond the size that is named
    radius = torch.where((growing | shrinking) & (specs.size < 0), 2.6, radius)
    radius = torch.where((growing | shrinking) & (specs.size >= 0), radius * GROWTH**-0.5, radius)
    radius = torch.where(shrinking, radius * GROWTH, radius)
    growth = torch.where(growing, GROWTH, torch.where(shrinking, 1 / GROWTH, 1.0))

    told = torch.tensor(SPEED_OF_WORD, device=device)[specs.speed.clamp(min=0)]
    speed = torch.where(specs.speed < 0, uniform(0.35, 0.75, n, 2), told)
    velocity = torch.tensor(DIRECTIONS, device=device)[motion] * speed[..., None]

    slot = torch.arange(int(total.max()), device=device)[None]
    group = (slot >= specs.count[:, :1]).long().expand(n, -1)
    of = {name: x.gather(1, group) for name, x in dict(shape=shape, color=color, motion=motion).items()}
    velocity = velocity[torch.arange(n, device=device)[:, None], group] * uniform(0.95, 1.05, *group.shape, 1)
    background = choose(torch.ones(n, len(BACKGROUNDS), dtype=torch.bool, device=device))
    return Layout(
        present=slot < total[:, None],
        radius=radius.gather(1, group),
        growth=growth.gather(1, group),
        start=torch.zeros_like(velocity),
        velocity=velocity,
        background=torch.where(specs.background < 0, background, specs.background),
        **of,
    ), group


def _reach(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, K, 2) lowest and highest start at which an object stays inside the frame for the whole clip."""
    around = torch.tensor(REACH, device=layout.shape.device)[layout.shape]
    room = (layout.radius * layout.growth.clamp(min=1) * around)[..., None] + 0.3
    way = layout.velocity * DURATION
    return room + (-way).clamp(min=0), UNITS - 1 - room - way.clamp(min=0)


def _instants(device) -> torch.Tensor:
    return torch.arange(0, DURATION + 1, 2, device=device)


def _apart(layout: Layout, starts: torch.Tensor) -> torch.Tensor:
    """Return (N, C) bool: no two objects come closer than one unit, measured between their circumscribed circles."""
    t = _instants(starts.device)
    reach = torch.tensor(REACH, device=starts.device)[layout.shape]
    reach = (layout.radius * reach)[..., None] * (1 + (layout.growth[..., None] - 1) * t / DURATION)  # (N, K, t)
    good = torch.ones(starts.shape[:2], dtype=torch.bool, device=starts.device)
    for a in range(starts.shape[2]):
        for b in range(a):
            drift = (layout.velocity[:, a] - layout.velocity[:, b])[:, None, None] * t[:, None]
            gap = ((starts[:, :, a] - starts[:, :, b])[:, :, None] + drift).norm(dim=-1)
            free = (gap > (reach[:, a] + reach[:, b] + 1)[:, None]).all(-1)
            good &= free | ~(layout.present[:, a] & layout.present[:, b])[:, None]
    return good


def _related(relation: torch.Tensor, layout: Layout, group: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return (N, C) bool: the relation holds clearly, at all times, between all objects of both groups."""
    t = _instants(starts.device)
    good = torch.ones(starts.shape[:2], dtype=torch.bool, device=starts.device)
    horizontal = ((relation == 1) | (relation == 2))[:, None, None]
    sign = torch.where((relation == 1) | (relation == 3), 1, -1)[:, None, None]
    for b in range(1, starts.shape[2]):
        for a in range(b):
            drift = (layout.velocity[:, b] - layout.velocity[:, a])[:, None, None] * t[:, None]
            dx, dy = ((starts[:, :, b] - starts[:, :, a])[:, :, None] + drift).unbind(-1)
            along = (sign * torch.where(horizontal, dx, dy)).amin(-1)
            across = torch.where(horizontal, dy, dx).abs().amax(-1)
            asked = layout.present[:, b] & (group[:, a] == 0) & (group[:, b] == 1) & (relation > 0)
            good &= ((along > 5) & (along > across - 2)) | ~asked[:, None]
    return good
