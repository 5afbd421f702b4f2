"""Clips with a single corruption, to test verifiers and learned rewards.

`SCENE_CORRUPTIONS` change the scene of a prompt before it is rendered; `VIDEO_CORRUPTIONS` change pixels.
`corrupt(name, scenes)` applies either kind and returns the scenes it applies to: "a circle" has no speed to change.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from .grammar import BACKGROUNDS, COLORS, SHAPES, SIZES, SPEEDS, Scene
from .layout import UNITS, search_layout
from .renderer import render_layout
from .specs import SceneSpecs

_OPPOSITE = {
    "moving left": "moving right",
    "moving right": "moving left",
    "moving up": "moving down",
    "moving down": "moving up",
    "growing": "shrinking",
    "shrinking": "growing",
    "staying still": "moving left",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}


def _with_first(scene: Scene, **changes) -> Scene:
    return replace(scene, groups=(replace(scene.groups[0], **changes), *scene.groups[1:]))


def _with_all(scene: Scene, attribute: str, change: Callable) -> Scene | None:
    """Change an attribute in every group that names it; return None if none does."""
    if not any(getattr(group, attribute) for group in scene.groups):
        return None
    groups = [g if getattr(g, attribute) is None else replace(g, **{attribute: change(g)}) for g in scene.groups]
    return replace(scene, groups=groups)


def _wrong_color(scene: Scene, rng: random.Random) -> Scene | None:
    used = [group.color for group in scene.groups]
    return _with_first(scene, color=rng.choice([c for c in COLORS if c not in used])) if used[0] else None


def _wrong_shape(scene: Scene, rng: random.Random) -> Scene:
    return _with_first(scene, shape=rng.choice([s for s in SHAPES if s != scene.groups[0].shape]))


def _wrong_count(scene: Scene, rng: random.Random) -> Scene | None:
    return _with_first(scene, count={1: 2, 2: 3, 3: 2}[scene.groups[0].count]) if len(scene.groups) == 1 else None


def _wrong_motion(scene: Scene, rng: random.Random) -> Scene | None:
    return _with_all(scene, "motion", lambda group: _OPPOSITE[group.motion])


def _wrong_size(scene: Scene, rng: random.Random) -> Scene | None:
    return _with_all(scene, "size", lambda group: SIZES[1 - SIZES.index(group.size)])


def _wrong_speed(scene: Scene, rng: random.Random) -> Scene | None:
    return _with_all(scene, "speed", lambda group: SPEEDS[1 - SPEEDS.index(group.speed)])


def _wrong_relation(scene: Scene, rng: random.Random) -> Scene | None:
    return replace(scene, relation=_OPPOSITE[scene.relation]) if scene.relation in _OPPOSITE else None


def _wrong_scene(scene: Scene, rng: random.Random) -> Scene | None:
    others = [b for b in BACKGROUNDS if b != scene.background]
    return replace(scene, background=rng.choice(others)) if scene.background else None


def _missing_object(scene: Scene, rng: random.Random) -> Scene | None:
    return Scene(scene.groups[:1], None, scene.background) if scene.relation else None


#: name -> f(scene, rng) -> the changed scene, or None if it does not apply
SCENE_CORRUPTIONS: dict[str, Callable[[Scene, random.Random], Scene | None]] = {
    "wrong_color": _wrong_color,
    "wrong_shape": _wrong_shape,
    "wrong_motion": _wrong_motion,
    "wrong_count": _wrong_count,
    "wrong_size": _wrong_size,
    "wrong_speed": _wrong_speed,
    "wrong_relation": _wrong_relation,
    "wrong_scene": _wrong_scene,
    "missing_object": _missing_object,
}


def _flicker(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    gain = 1 + 0.25 * torch.randn(videos.shape[:2], generator=generator)
    return (videos * gain[..., None, None, None]).clamp(0, 1)


def _frozen(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return videos[:, :1].expand_as(videos).clone()


def _time_reversed(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return videos.flip(1)


def _shuffled_frames(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(videos.shape[:2], generator=generator).argsort(1)
    return videos[torch.arange(len(videos))[:, None], order]


def _noise(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise of standard deviation .2 on blocks of half a unit (one pixel at 64)."""
    size = (*videos.shape[:3], 2 * UNITS, 2 * UNITS)
    noise = F.interpolate(torch.randn(size, generator=generator).flatten(0, 1), videos.shape[-2:])
    return (videos + 0.2 * noise.view(videos.shape)).clamp(0, 1)


def _blur(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur with a box of about two and a half units (five pixels at 64)."""
    side = round(1.25 * videos.shape[-1] / UNITS - 0.5)
    frames = F.pad(videos.flatten(0, 1), (side,) * 4, mode="replicate")
    return F.avg_pool2d(frames, 2 * side + 1, 1).view(videos.shape)


def _jitter(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each frame by -1, 0 or 1 unit in x and in y; the gap is filled with the border."""
    unit = videos.shape[-1] // UNITS
    wide = F.pad(videos.flatten(0, 1), (unit,) * 4, mode="replicate").view(*videos.shape[:3], *[34 * unit] * 2)
    out = torch.empty_like(videos)
    for t in range(videos.shape[1]):
        y, x = (torch.randint(0, 3, (2,), generator=generator) * unit).tolist()
        out[:, t] = wide[:, t, :, y : y + videos.shape[-2], x : x + videos.shape[-1]]
    return out


def _vanish_half(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    out, half = videos.clone(), videos.shape[1] // 2
    out[:, half:] = videos[:, :1, :, :1, :1]
    return out


def _uniform_noise(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(videos.shape, generator=generator)


#: name -> f(videos (B, F, 3, H, W) on the CPU, generator) -> changed videos
VIDEO_CORRUPTIONS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "flicker": _flicker,
    "frozen": _frozen,
    "time_reversed": _time_reversed,
    "shuffled_frames": _shuffled_frames,
    "noise": _noise,
    "blur": _blur,
    "jitter": _jitter,
    "vanish_half": _vanish_half,
    "uniform_noise": _uniform_noise,
}
#: Corruptions of time, which are visible only in scenes that name a motion.
_OF_TIME = ("frozen", "time_reversed", "shuffled_frames")


def corrupt(name: str, scenes: Sequence[Scene], seed: int = 0, size: int = 64) -> tuple[list[int], torch.Tensor]:
    """Render scenes with a single corruption.

    Args:
        name: a key of `SCENE_CORRUPTIONS` or `VIDEO_CORRUPTIONS`.
        scenes: the scenes of the prompts.
        seed: seed of the change and of the rendering.
        size: height and width in pixels, a multiple of 32.

    Returns:
        The indices of the K scenes that it applies to and that still have a legal layout, and (K, 17, 3, size, size)
        clips that contradict them.

    Raises:
        ValueError: the name is unknown, or the corruption applies to no scene.
    """
    if name in SCENE_CORRUPTIONS:
        rng = random.Random(seed)
        changed = [SCENE_CORRUPTIONS[name](scene, rng) for scene in scenes]
    elif name in VIDEO_CORRUPTIONS:
        changed = [scene if name not in _OF_TIME or _moves(scene) else None for scene in scenes]
    else:
        raise ValueError(f"name={name!r}; allowed: {', '.join([*SCENE_CORRUPTIONS, *VIDEO_CORRUPTIONS])}.")
    rows = [i for i, scene in enumerate(changed) if scene is not None]
    if not rows:
        raise ValueError(
            f"name={name!r} applies to none of the {len(scenes)} scenes; give scenes that name this attribute."
        )
    layout, legal = search_layout(
        SceneSpecs.from_scenes([changed[i] for i in rows]), torch.Generator().manual_seed(seed)
    )
    rows = [i for i, fits in zip(rows, legal.tolist(), strict=True) if fits]
    videos = render_layout(layout[legal], size)
    if name in VIDEO_CORRUPTIONS:
        videos = VIDEO_CORRUPTIONS[name](videos, torch.Generator().manual_seed(seed))
    return rows, videos


def _moves(scene: Scene) -> bool:
    return any(group.motion not in (None, "staying still") for group in scene.groups)
