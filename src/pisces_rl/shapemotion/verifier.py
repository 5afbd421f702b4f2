"""Score a clip exactly, from only its pixels and its prompt.

    result = verify(videos, ["a red circle moving left"])
    result.correct, result.alignment, result.alignment_dimensions["motion"]

Alignment dimensions are in [0, 1], or NaN if the prompt does not ask for them; with two groups, they are averaged.

| dimension | asked by | measured |
|---|---|---|
| object_class | every prompt | share of pieces that look like the shape, over sampled frames |
| color | a color | share of frames in which something has it |
| count | every prompt | share of frames with as many pieces |
| multiple_objects | two groups | share of sampled frames in which both show their shape |
| spatial_relationship | a relation other than "and" | share of frames in which it holds between the centroids |
| motion | a motion | direction and steadiness of the fitted velocity, or growth of the radius; times presence |
| speed | a speed | size of the fitted velocity; times presence |
| size | a size | median radius of one object |
| scene | a background | color of the frame's border |
| no_extra_objects | every prompt | share of frames without a color that no group accounts for |

A group is matched to the objects of its color. If its color is missing or not named, it is matched to the remaining
color that shows its shape best, so a circle of the wrong color fails only in color, not in shape, count and motion.

`alignment` is the mean of the dimensions asked for, `quality` the mean of `QUALITY` in quality.py, and `correct` is
true if each of these dimensions of each group reaches its threshold in `PASS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from .clip_quality import QUALITY, quality_dimensions
from .grammar import parse
from .layout import DIRECTIONS, UNITS
from .segmentation import nearest_background, pool, segment
from .specs import SceneSpecs
from .tracks import MIN_AREA, Tracks, track

#: The score at which a dimension passes. Shares of frames need .75, so that an object that vanishes halfway fails.
PASS = {
    "object_class": 0.75,
    "color": 0.75,
    "count": 0.75,
    "multiple_objects": 0.75,
    "spatial_relationship": 0.75,
    "motion": 0.5,
    "speed": 0.5,
    "size": 0.5,
    "scene": 0.5,
    "no_extra_objects": 0.75,
}
ALIGNMENT = tuple(PASS)

_FOUND = 0.25  # a color is present, and matched to its group, from this share of frames
_CLIPS = 16  # verified at once, to fit a CPU's caches
_GROWING, _SHRINKING = 5, 6


@dataclass
class Verification:
    """Scores of B clips, numpy float64.

    Attributes:
        alignment_dimensions: name of `ALIGNMENT` -> (B,), NaN if the prompt does not ask for it.
        quality_dimensions: name of `QUALITY`, or "dynamic_degree" -> (B,).
        alignment: (B,) mean of the asked alignment dimensions.
        quality: (B,) mean of `QUALITY`; without dynamic_degree, see quality.py.
        correct: (B,) bool.
    """

    alignment_dimensions: dict[str, np.ndarray]
    quality_dimensions: dict[str, np.ndarray]
    alignment: np.ndarray
    quality: np.ndarray
    correct: np.ndarray

    def __len__(self) -> int:
        return len(self.correct)

    def summary(self) -> dict[str, float]:
        """Return means over the clips. A dimension's mean is over the clips that ask for it, absent if none do."""
        out = {"correct": self.correct.mean(), "alignment": self.alignment.mean(), "quality": self.quality.mean()}
        for name, values in {**self.alignment_dimensions, **self.quality_dimensions}.items():
            if not np.isnan(values).all():
                out[name] = np.nanmean(values)
        return {name: float(value) for name, value in out.items()}


@torch.no_grad()
def verify(videos: torch.Tensor, prompts: Sequence[str]) -> Verification:
    """Score clips against their prompts, each clip independently.

    Args:
        videos: (B, F, 3, H, H) float of any type and device, in [0, 1]; F at least 4, H a multiple of 32.
        prompts: B texts of the grammar.

    Raises:
        ValueError: videos have another shape or type, or are not finite or not in [0, 1]; the number of prompts does
            not match; or a prompt is empty or not in the grammar.
    """
    _check(videos, prompts)
    specs = SceneSpecs.from_scenes([parse(prompt) for prompt in prompts])
    parts = [
        _verify(videos[first : first + _CLIPS], specs[slice(first, first + _CLIPS)])
        for first in range(0, len(prompts), _CLIPS)
    ]
    return Verification(**{f.name: _join([getattr(part, f.name) for part in parts]) for f in fields(Verification)})


def _verify(videos: torch.Tensor, specs: SceneSpecs) -> Verification:
    seg = segment(pool(videos))
    tracks = track(seg)
    specs = SceneSpecs(**{f.name: getattr(specs, f.name).numpy() for f in fields(specs)})
    scores = _alignment(tracks, specs, _bind(tracks, specs))
    shade, distance = (x.numpy() for x in nearest_background(seg.background))
    scene = (shade == specs.background) * _ramp(distance, 0.35, 0.1)
    scores["scene"] = np.where(specs.background >= 0, scene, np.nan)[:, None]
    quality = quality_dimensions(seg, tracks)

    passed = [np.isnan(score) | (score >= PASS[name]) for name, score in scores.items()]
    means = {name: _mean_asked(scores[name]) for name in ALIGNMENT}
    return Verification(
        alignment_dimensions=means,
        quality_dimensions=quality,
        alignment=_mean_asked(np.stack(list(means.values()), 1)),
        quality=np.mean([quality[name] for name in QUALITY], axis=0),
        correct=np.concatenate(passed, 1).all(1),
    )


def _bind(tracks: Tracks, specs: SceneSpecs) -> np.ndarray:
    """Return (B, 2) the track that each group is matched to; the empty track if none remains."""
    empty = len(tracks.clip) - 1
    likeness = tracks.shape.mean(1)
    clips = np.arange(len(specs))[:, None]
    told = specs.color >= 0
    bound = np.where(told, tracks.of[clips, specs.color], empty)
    bound[tracks.presence[bound] < _FOUND] = empty
    for clip, g in zip(*((bound == empty) & (specs.shape >= 0)).nonzero(), strict=True):
        taken = {*specs.color[clip][told[clip]], *tracks.color[bound[clip]]}
        left = [t for color, t in enumerate(tracks.of[clip]) if t < empty and color not in taken]
        if left:
            bound[clip, g] = max(left, key=lambda t: likeness[t, specs.shape[clip, g]])
    return bound


def _alignment(tracks: Tracks, specs: SceneSpecs, bound: np.ndarray) -> dict[str, np.ndarray]:
    """Compute all dimensions but `scene`: (B, 2) for those of groups, (B, 1) for those of clips."""
    there, pair = specs.shape >= 0, specs.shape[:, 1] >= 0
    clips = np.arange(len(specs))
    presence, present = tracks.presence[bound], tracks.present[bound]

    def asked(score, where):
        return np.where(where, score, np.nan)

    shown = np.take_along_axis(tracks.shape[bound], np.maximum(specs.shape, 0)[..., None, None], -1)[..., 0]
    own = tracks.of[clips[:, None], specs.color]
    # the named color itself, not the substitute that the group was matched to
    color = np.where(specs.color >= 0, tracks.presence[own], 0)
    count = (tracks.pieces[bound] == specs.count[..., None]).mean(-1)

    vx, vy = (v[bound] for v in tracks.velocity())
    motion = _motion(specs.motion, vx, vy, tracks.steadiness()[bound], tracks.growth()[bound]) * presence
    speed, radius = np.hypot(vx, vy), tracks.radius[bound]
    slow = _ramp(speed, 0.72, 0.52) * (speed > 0.15)
    speed = np.where(specs.speed == 0, slow, _ramp(speed, 0.52, 0.72)) * presence
    size = np.where(specs.size == 0, _ramp(radius, 4.4, 3.3), _ramp(radius, 3.3, 4.4)) * (radius > 2)

    dx, dy = (np.diff(c[bound], axis=1)[:, 0] for c in (tracks.x, tracks.y))
    holds = _relation(specs.relation, dx, dy) & present.all(1)

    accounted = np.zeros((len(specs), 1 + tracks.of.shape[1]), bool)  # the last column is for index -1
    accounted[clips[:, None], specs.color] = True
    accounted[clips[:, None], tracks.color[bound]] = True
    extra = ((tracks.pixels > MIN_AREA) & ~accounted[:, :-1, None]).any(1)
    return {
        "object_class": asked(shown.mean(-1), there),
        "color": asked(color, specs.color >= 0),
        "count": asked(count, there),
        "multiple_objects": asked(shown.prod(1).mean(-1), pair)[:, None],
        "spatial_relationship": asked(holds.mean(-1), specs.relation > 0)[:, None],
        "motion": asked(motion, specs.motion >= 0),
        "speed": asked(speed, specs.speed >= 0),
        "size": asked(size, specs.size >= 0),
        "no_extra_objects": 1 - extra.mean(-1)[:, None],
    }


def _motion(
    motion: np.ndarray, vx: np.ndarray, vy: np.ndarray, steadiness: np.ndarray, growth: np.ndarray
) -> np.ndarray:
    """Score how well a velocity (units per 1/16 clip), its steadiness and the radius' growth match
    `MOTIONS[motion]`."""
    direction = np.array(DIRECTIONS)[np.maximum(motion, 0)]
    speed, along = np.hypot(vx, vy), vx * direction[..., 0] + vy * direction[..., 1]
    moving = _ramp(along, 0.08, 0.25) * _ramp(along / (speed + 1e-6), 0.6, 0.9) * _ramp(steadiness, 0.2, 0.5)
    still = _ramp(speed, 0.25, 0.12) * _ramp(growth, 1.3, 1.15) * _ramp(growth, 0.77, 0.87)
    growing, shrinking = _ramp(growth, 1.1, 1.45), _ramp(growth, 0.9, 0.68)
    return np.select([motion == 0, motion == _GROWING, motion == _SHRINKING], [still, growing, shrinking], moving)


def _relation(relation: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """(B, F) bool: whether `RELATIONS[relation]` holds for the second centroid minus the first."""
    index = relation[:, None]
    along = np.select([index == 1, index == 2, index == 3], [dx, -dx, dy], -dy)
    across = np.where(index <= 2, dy, dx)
    return (along > 2) & (along > 0.7 * np.abs(across))


def _ramp(x: np.ndarray, zero: float, one: float) -> np.ndarray:
    """Linear from 0 at `zero` to 1 at `one`, clipped."""
    return np.clip((x - zero) / (one - zero), 0, 1)


def _mean_asked(scores: np.ndarray) -> np.ndarray:
    """(B, K) -> (B,) mean of what is not NaN, NaN where all is."""
    asked = ~np.isnan(scores)
    mean = np.where(asked, scores, 0).sum(1) / np.maximum(asked.sum(1), 1)
    return np.where(asked.any(1), mean, np.nan)


def _join(parts: list):
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _check(videos: torch.Tensor, prompts: Sequence[str]) -> None:
    allowed = f"allowed: a float tensor (B, F >= 4, 3, H, H) in [0, 1], H a multiple of {UNITS}"
    if not isinstance(videos, torch.Tensor):
        raise ValueError(f"videos is a {type(videos).__name__}; {allowed}: stack the clips into one tensor.")
    if videos.ndim != 5 or videos.shape[2] != 3 or videos.shape[1] < 4:
        raise ValueError(f"videos has shape {tuple(videos.shape)}; {allowed}. Channels come third: permute if needed.")
    if videos.shape[-1] != videos.shape[-2] or videos.shape[-1] % UNITS or not videos.shape[-1]:
        raise ValueError(f"videos has frames of {tuple(videos.shape[-2:])} pixels; {allowed}: crop or resize them.")
    if not videos.is_floating_point():
        raise ValueError(f"videos has dtype {videos.dtype}; {allowed}: divide bytes by 255.")
    if isinstance(prompts, str) or len(prompts) != len(videos):
        what = "one text" if isinstance(prompts, str) else f"{len(prompts)} texts"
        raise ValueError(f"prompts is {what} for {len(videos)} videos; allowed: a list with one text per video.")
    if not len(videos):
        raise ValueError(f"videos holds no clip; {allowed} with B >= 1.")
    low, high = (float(x) for x in videos.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"videos has values that are not finite; {allowed}. Check whether the policy has diverged.")
    if low < -0.01 or high > 1.01:
        raise ValueError(
            f"videos has values from {low:.3g} to {high:.3g}; {allowed}: rescale them, for example by (x + 1) / 2."
        )
