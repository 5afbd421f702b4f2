"""Track each color over time: size, position, number of pieces and shape, independent of the prompt.

A track is one color in one clip. Identical objects share a track: they have one color and move together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from .grammar import COLORS, SHAPES
from .layout import DURATION, UNITS
from .renderer import COLOR_RGB, coverage
from .segmentation import Segmentation, dilate

MIN_AREA = 6  # a color is present in a frame if it covers more units than this
MIN_PIECE = 5  # size in units of the smallest piece that counts as an object
_NEIGHBOURS = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])  # none between frames


@dataclass
class Tracks:
    """N tracks of F frames, numpy; row N of every array is the empty track, for "not found".

    Attributes:
        clip: (N + 1,) index of the clip; -1 for the empty track.
        color: (N + 1,) index of the color; -1 for the empty track.
        of: (B, 6) the track of a color in a clip, N if there is none.
        pixels: (B, 6, F) units of each color, before any threshold.
        present: (N + 1, F) bool.
        area: (N + 1, F) soft area in square units, of all pieces.
        x, y: (N + 1, F) centroid weighted by coverage, units.
        pieces: (N + 1, F) number of connected pieces of at least `MIN_PIECE` units.
        shape: (N + 1, S, 4) in S sampled frames, the share of pieces that look like each of `SHAPES`.
        tint: (N + 1, F, 3) mean color of the covered pixels, NaN if there are too few.
    """

    clip: np.ndarray
    color: np.ndarray
    of: np.ndarray
    pixels: np.ndarray
    present: np.ndarray
    area: np.ndarray
    x: np.ndarray
    y: np.ndarray
    pieces: np.ndarray
    shape: np.ndarray
    tint: np.ndarray

    @property
    def presence(self) -> np.ndarray:
        """Return (N + 1,) share of the frames in which the track is present."""
        return self.present.mean(1)

    @property
    def objects(self) -> np.ndarray:
        """(N + 1,) typical number of pieces, at least 1."""
        return np.maximum(_median(self.pieces, self.present), 1).round()

    @property
    def radius(self) -> np.ndarray:
        """Return (N + 1,) median radius of one object in units, 0 if it is never present."""
        return np.sqrt(_median(self.area, self.present) / self.objects / math.pi)

    def velocity(self) -> tuple[np.ndarray, np.ndarray]:
        """(N + 1,) and (N + 1,): least-squares velocity (x, y) in units per 1/16 clip; y points down."""
        return _line(self.x, self.present)[1], _line(self.y, self.present)[1]

    def steadiness(self) -> np.ndarray:
        """Return (N + 1,) share of the centroid's variance explained by velocity: 1 for a motion, 0 for a wobble."""
        explained = sum(v**2 for v in self.velocity()) * _variance(_times(self.present), self.present)
        total = _variance(self.x, self.present) + _variance(self.y, self.present)
        return explained / np.maximum(total, 1e-6)

    def growth(self) -> np.ndarray:
        """Return (N + 1,) last radius over first radius by least squares; 1 if the track is not present."""
        first, slope = _line(np.sqrt(self.area / self.objects[:, None] / math.pi), self.present)
        return 1 + slope * DURATION / np.maximum(first, 0.5)


def track(seg: Segmentation) -> Tracks:
    """Follow every color that is present in any frame of a clip."""
    clips, frames = seg.color.shape[:2]
    cell = np.repeat(np.arange(clips * frames) * 7, UNITS**2) + seg.color.flatten().numpy() + 1
    pixels = np.bincount(cell, minlength=clips * frames * 7).reshape(clips, frames, 7)[..., 1:].swapaxes(1, 2)
    clip, color = (pixels > MIN_AREA).any(2).nonzero()
    of = np.full((clips, len(COLORS)), len(clip))
    of[clip, color] = np.arange(len(clip))

    # only pixels in and next to a mask have coverage: a few hundred of a clip's 17,408
    mask = seg.color[clip] == torch.from_numpy(color)[:, None, None, None]
    where = np.flatnonzero(dilate(mask).numpy())
    t, cell, place = where // (frames * UNITS**2), where // UNITS**2, where % UNITS**2
    rgb = seg.pixels.flatten(2).numpy()[clip[t], :, where % (frames * UNITS**2)]
    background = seg.background.numpy()
    axis = (COLOR_RGB.numpy()[color] - background[clip])[t]
    alpha = ((rgb - background[clip[t]]) * axis).sum(1) / np.maximum((axis**2).sum(1), 1e-6)
    alpha = alpha.clip(0, 1)
    soft = torch.zeros(mask.shape)
    soft.view(-1)[torch.from_numpy(where)] = torch.from_numpy(alpha)

    def per_frame(values):  # sum over the pixels of each track and frame
        return np.bincount(cell, values, len(clip) * frames).reshape(len(clip), frames)

    area = per_frame(alpha)
    pieces, shape = _pieces(mask, soft)
    solid = mask.flatten().numpy()[where] & (alpha > 0.85)
    weight = per_frame(solid)
    tint = np.stack([per_frame(solid * channel) for channel in rgb.T], -1) / np.maximum(weight, 1)[..., None]

    def close(values, empty=0):  # append the empty track
        return np.concatenate([values, np.full((1, *values.shape[1:]), empty, values.dtype)])

    return Tracks(
        clip=close(clip, -1),
        color=close(color, -1),
        of=of,
        pixels=pixels,
        present=close(pixels[clip, color] > MIN_AREA),
        area=close(area),
        x=close(per_frame(alpha * (place % UNITS)) / np.maximum(area, 1)),
        y=close(per_frame(alpha * (place // UNITS)) / np.maximum(area, 1)),
        pieces=close(pieces),
        shape=close(shape),
        tint=close(np.where(weight[..., None] > 2, tint, np.nan), np.nan),
    )


def _pieces(mask: torch.Tensor, soft: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Count connected pieces of (N, F, 32, 32) masks: (N, F) number, and (N, S, 4) shares by shape."""
    n, frames = mask.shape[:2]
    step = max(1, frames // 6)
    sampled = -(-frames // step)
    if not n:
        return np.zeros((0, frames)), np.zeros((0, sampled, len(SHAPES)))
    labels, found = ndimage.label(mask.flatten(0, 1).numpy(), structure=_NEIGHBOURS)
    where = np.flatnonzero(labels)
    label = labels.ravel()[where]
    size = np.bincount(label, minlength=found + 1)
    frame = np.zeros(found + 1, int)
    frame[label] = where // UNITS**2
    kept = np.flatnonzero(size >= MIN_PIECE)
    kept = kept[kept > 0]
    pieces = np.bincount(frame[kept], minlength=n * frames).reshape(n, frames)

    kept = kept[frame[kept] % frames % step == 0]
    rows = torch.from_numpy(frame[kept])
    piece = torch.from_numpy(labels)[rows] == torch.from_numpy(kept.astype(labels.dtype))[:, None, None]
    looks = _looks(soft.flatten(0, 1)[rows] * dilate(piece)).numpy()
    slot = frame[kept] // frames * sampled + frame[kept] % frames // step
    votes = np.bincount(slot * len(SHAPES) + looks, minlength=n * sampled * len(SHAPES))
    votes = votes.reshape(n, sampled, len(SHAPES))
    return pieces, votes / np.maximum(votes.sum(-1, keepdims=True), 1)


def _looks(soft: torch.Tensor) -> torch.Tensor:
    """(M, 32, 32) coverage of single pieces -> (M,) the shape whose template overlaps best (soft IoU)."""
    area = soft.sum((1, 2)).clamp(min=3)
    units = torch.arange(UNITS, dtype=torch.float32)
    x = (soft.sum(1) * units).sum(1) / area
    y = (soft.sum(2) * units).sum(1) / area
    radius = (area / math.pi).sqrt()[:, None, None]
    dx, dy = (units - x[:, None])[:, None], (units - y[:, None])[..., None]
    scores = []
    for shape in SHAPES:
        both = torch.minimum(template := coverage(shape, dx, dy, radius), soft).sum((1, 2))
        scores.append(both / (template.sum((1, 2)) + area - both))
    return torch.stack(scores).argmax(0)


def _median(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(N, F) -> (N,) median over the frames of `where`, 0 where there are none."""
    order = np.sort(np.where(where, values, np.inf), axis=1)
    count = where.sum(1)
    low = np.take_along_axis(order, np.maximum(count - 1, 0)[:, None] // 2, 1)[:, 0]
    high = np.take_along_axis(order, np.minimum(count, values.shape[1] - 1)[:, None] // 2, 1)[:, 0]
    return np.where(count > 0, (low + high) / 2, 0)


def _times(where: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.linspace(0, DURATION, where.shape[1]), where.shape)


def _average(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(N, F) -> (N,) mean over the frames of `where`, 0 where there are none."""
    return (values * where).sum(1) / np.maximum(where.sum(1), 1)


def _variance(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return _average((values - _average(values, where)[:, None]) ** 2, where)


def _line(values: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares over the frames of `where`: (N,) value at time 0 and (N,) slope; slope 0 under four frames."""
    time = _times(where)
    middle, mean = _average(time, where), _average(values, where)
    slope = _average((time - middle[:, None]) * values, where) / np.maximum(_variance(time, where), 1e-9)
    slope = np.where(where.sum(1) >= 4, slope, 0)
    return mean - slope * middle, slope
