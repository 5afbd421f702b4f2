"""Segment pixels by color: each pixel is modeled as a mixture of the background and one color of the palette.

With the measured background b and color c_k, a pixel v is modeled as b + alpha (c_k - b), where alpha is the
least-squares value in [0, 1.15]. The k with the smallest residual is the color. A pixel belongs to the color if
alpha > .5 and the residual is < .35 (RGB distance). All computations are on a grid of 32 x 32 units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from .layout import UNITS
from .renderer import BACKGROUND_RGB, COLOR_RGB


@dataclass
class Segmentation:
    """B clips of F frames, on the CPU.

    Attributes:
        pixels: (B, 3, F, 32, 32) colors.
        background: (B, 3) the median color of the frame's border.
        color: (B, F, 32, 32) int8, index into `COLORS`, -1 for the background and for other colors.
        opacity: (B, F, 32, 32) alpha of the best color, at most 1.
        residual: (B, F, 32, 32) distance to the nearest mixture.
        distance: (B, F, 32, 32) distance to the background.
    """

    pixels: torch.Tensor
    background: torch.Tensor
    color: torch.Tensor
    opacity: torch.Tensor
    residual: torch.Tensor
    distance: torch.Tensor


def pool(videos: torch.Tensor) -> torch.Tensor:
    """Pool (B, F, 3, H, W) of any float type and device to (B, 3, F, 32, 32) float32 on the CPU, clamped to [0, 1]."""
    factor = videos.shape[-1] // UNITS
    videos = videos.float()
    if factor > 1:
        # rows first: this reads memory in order and is five times as fast as avg_pool2d
        rows = reduce(torch.add, (videos[..., i::factor, :] for i in range(factor)))
        videos = reduce(torch.add, (rows[..., i::factor] for i in range(factor))) / factor**2
    return videos.cpu().clamp(0, 1).transpose(1, 2).contiguous()


def segment(pixels: torch.Tensor) -> Segmentation:
    """Segment the pooled pixels of `pool`."""
    background = _border(pixels).median(-1).values
    offset = (pixels - background[..., None, None, None]).flatten(2)
    distance2 = offset.square().sum(1)
    # one color at a time with a running minimum: six at once exceed the caches, and torch.min with indices is slow
    least, opacity = torch.full_like(distance2, torch.inf), torch.zeros_like(distance2)
    color = torch.zeros_like(distance2, dtype=torch.int8)
    for k, rgb in enumerate(COLOR_RGB):
        axis = rgb - background
        length2 = axis.square().sum(-1, keepdim=True).clamp(min=1e-6)
        dot = (axis[:, None] @ offset)[:, 0]
        alpha = (dot / length2).clamp_(0, 1.15)
        residual2 = (alpha * length2).sub_(dot, alpha=2).mul_(alpha)  # without distance2, which is common to all
        closer = residual2 < least
        least, opacity = torch.minimum(residual2, least), torch.where(closer, alpha, opacity)
        color.masked_fill_(closer, k)
    residual = least.add_(distance2).clamp_(min=0).sqrt_()
    color.masked_fill_((opacity <= 0.5) | (residual >= 0.35), -1)
    shape = len(pixels), *pixels.shape[2:]
    return Segmentation(
        pixels=pixels,
        background=background,
        color=color.view(shape),
        opacity=opacity.clamp_(max=1).view(shape),
        residual=residual.view(shape),
        distance=distance2.sqrt_().view(shape),
    )


def nearest_background(background: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3) measured colors -> (B,) index into `BACKGROUNDS` and (B,) RGB distance to it."""
    distance, index = (background[:, None] - BACKGROUND_RGB).norm(dim=-1).min(1)
    return index, distance


def dilate(mask: torch.Tensor) -> torch.Tensor:
    """Dilate a (..., H, W) bool mask by 3 x 3."""
    grown = mask.clone()
    grown[..., 1:, :] |= mask[..., :-1, :]
    grown[..., :-1, :] |= mask[..., 1:, :]
    out = grown.clone()
    out[..., 1:] |= grown[..., :-1]
    out[..., :-1] |= grown[..., 1:]
    return out


def _border(pixels: torch.Tensor) -> torch.Tensor:
    sides = (pixels[..., 0, :], pixels[..., -1, :], pixels[..., :, 0], pixels[..., :, -1])
    return torch.cat(sides, -1).flatten(2)
