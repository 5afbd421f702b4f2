"""Quality of a clip, independent of its prompt: five dimensions in [0, 1], and whether anything moves.

A frozen clip has quality 1, so `quality` alone rewards freezing. `dynamic_degree` is reported but not part of the
mean, since prompts may ask for stillness. Use quality together with alignment, as `shapemotion_product` does.
"""

from __future__ import annotations

import numpy as np
import torch

from .segmentation import Segmentation, dilate
from .tracks import Tracks

#: The dimensions that `quality` averages.
QUALITY = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "imaging_quality",
)


def quality_dimensions(seg: Segmentation, tracks: Tracks) -> dict[str, np.ndarray]:
    """Compute the dimensions of `QUALITY` and `dynamic_degree`, each (B,) in [0, 1]; 1 means good, or moving.

    - subject_consistency: objects keep their color and size from frame to frame and do not vanish.
    - background_consistency: the background has one color.
    - temporal_flickering: the background does not change from frame to frame.
    - motion_smoothness: centroids do not accelerate; a mean second difference of 1.2 units a frame is 0.
    - imaging_quality: pixels are mixtures of the background and one color, and edges are about one unit wide.
    - dynamic_degree: 1 when an object moves by .25 units in 1/16 clip or changes its size by a third.

    Dimensions of objects are 0 without objects, those of the background 0 without background.
    """
    near = dilate(seg.color >= 0)
    empty = ~near
    room = empty.sum((1, 2, 3))
    spread = _mean(seg.distance, empty, (1, 2, 3))
    still = empty[:, 1:] & empty[:, :-1]
    change = _mean(seg.pixels.diff(dim=2).abs().mean(1), still, (1, 2, 3))
    clarity = 1 - (6 * seg.residual.mean((1, 2, 3))).clamp(max=1)
    width = _edge_width(seg.opacity, dilate(near))
    return {
        "subject_consistency": _over_tracks(tracks, _consistency(tracks)),
        "background_consistency": (1 - (5 * spread).clamp(max=1)).mul(room > 0).numpy(),
        "temporal_flickering": (1 - (10 * change).clamp(max=1)).mul(still.any(3).any(2).any(1)).numpy(),
        "motion_smoothness": _over_tracks(tracks, _smoothness(tracks)),
        "imaging_quality": (clarity * ((4.0 - width) / 2.0).clamp(0, 1)).numpy(),
        "dynamic_degree": _dynamic(tracks),
    }


def _edge_width(opacity: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """(B,) mean width of the edges in units: across a linear edge of width w the integral of 4 a (1 - a) is 2 w / 3,
    and that of |grad a| is 1."""
    opacity = opacity * near
    soft = (opacity * (1 - opacity)).sum((1, 2, 3)) * 4
    dx = (opacity[..., :-1, 1:] - opacity[..., :-1, :-1]).square_()
    dy = (opacity[..., 1:, :-1] - opacity[..., :-1, :-1]).square_()
    slope = dx.add_(dy).sqrt_().sum((1, 2, 3))
    return 1.5 * soft / slope.clamp(min=1e-6)


def _consistency(tracks: Tracks) -> np.ndarray:
    """(N + 1,) one minus the changes of color (x 4) and the jitter of size (x .8), times presence."""
    tint = np.abs(np.diff(tracks.tint, axis=1)).mean(-1)
    tint = _nanmean(tint, 1.0)
    side = np.sqrt(np.where(tracks.present, tracks.area, np.nan))
    jitter = _nanmean(np.abs(np.diff(side, n=2, axis=1)), 1.0) / np.maximum(_nanmean(side, 1.0), 1e-6)
    return np.maximum(0, 1 - 4 * tint - 0.8 * jitter) * tracks.presence


def _smoothness(tracks: Tracks) -> np.ndarray:
    """(N + 1,) one minus the mean second difference of the centroid over 1.2 units."""
    centre = np.where(tracks.present[..., None], np.stack([tracks.x, tracks.y], -1), np.nan)
    bend = _nanmean(np.abs(np.diff(centre, n=2, axis=1)).mean(-1), 1.2)
    return np.maximum(0, 1 - bend / 1.2)


def _dynamic(tracks: Tracks) -> np.ndarray:
    moves = (np.hypot(*tracks.velocity()) > 0.25) | (np.abs(np.log(np.maximum(tracks.growth(), 0.1))) > np.log(1.33))
    clips = len(tracks.of)
    return (np.bincount(tracks.clip[:-1], moves[:-1], clips) > 0).astype(float)


def _over_tracks(tracks: Tracks, values: np.ndarray) -> np.ndarray:
    """(N + 1,) values of tracks -> (B,) their mean weighted by area, 0 without tracks."""
    clips, clip, weight = len(tracks.of), tracks.clip[:-1], tracks.area.sum(1)[:-1]
    total = np.bincount(clip, weight, clips)
    return np.bincount(clip, weight * values[:-1], clips) / np.maximum(total, 1e-6)


def _mean(values: torch.Tensor, where: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return (values * where).sum(dims) / where.sum(dims).clamp(min=1)


def _nanmean(values: np.ndarray, empty: float) -> np.ndarray:
    """(N, T) -> (N,) mean of what is not NaN, `empty` where all is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), empty)
