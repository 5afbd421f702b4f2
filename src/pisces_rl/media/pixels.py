"""Convert videos to uint8 arrays, channels last."""

import math

import numpy as np
import torch
from torch import Tensor


def pixels(name: str, video: Tensor, ndim: int) -> np.ndarray:
    """Check a video, and return it as uint8, channels last."""
    shape = {4: "(F, 3, H, W)", 5: "(B, F, 3, H, W)"}[ndim]
    if not isinstance(video, Tensor):
        raise ValueError(f"{name} is a {type(video).__name__}; allowed: a float tensor {shape} in [0, 1].")
    if video.ndim != ndim or video.shape[-3] != 3 or 0 in video.shape:
        raise ValueError(f"{name} has shape {tuple(video.shape)}; allowed: {shape} with 3 channels and no empty axis.")
    if not video.is_floating_point():
        raise ValueError(f"{name} has dtype {video.dtype}; allowed: floats in [0, 1]. Divide bytes by 255.")
    video = video.detach().float()
    if not bool(torch.isfinite(video).all()):
        bad = (~torch.isfinite(video)).nonzero()[0, : ndim - 3].tolist()
        where = f"video {bad[0]}, frame {bad[1]}" if ndim == 5 else f"frame {bad[0]}"
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity), the first in {where}.")
    return (video.clamp(0, 1) * 255).round().byte().movedim(-3, -1).contiguous().cpu().numpy()


def enlarge(frames: np.ndarray, min_size: int) -> np.ndarray:
    """Enlarge the shorter side to at least `min_size` by an integer factor, nearest neighbour; 0 keeps the size."""
    factor = math.ceil(min_size / min(frames.shape[-3:-1])) if min_size else 1
    return frames if factor <= 1 else frames.repeat(factor, axis=-3).repeat(factor, axis=-2)
