"""Video and picture files as tensors and PIL images."""

import io
import os
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def load_video(path: str | Path | bytes, frames: int | None = None) -> Tensor:
    """A video file as (F, 3, H, W) float in [0, 1].

    Args:
        path: of the file, or the file's bytes.
        frames: keep this many, evenly spread from first to last; None keeps all. A shorter video keeps all.

    Raises ValueError for a file that is no video or has no frames.
    """
    name = f"{len(path)} bytes" if isinstance(path, bytes) else path
    try:
        with av.open(io.BytesIO(path) if isinstance(path, bytes) else str(path)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{name}: cannot be read as a video ({error}).") from error
    if not decoded:
        raise ValueError(f"{name}: the video has no frames.")
    if frames is not None and frames < len(decoded):
        decoded = [decoded[i] for i in np.linspace(0, len(decoded) - 1, frames).round().astype(int)]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


def load_image(given) -> Image.Image:
    """An RGB picture from a PIL image, a path, or a tensor (3, H, W) in [0, 1] or of whole numbers up to 255.

    Raises ValueError for anything else, and for a file that is no picture.
    """
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, (str, os.PathLike)):
        try:
            with Image.open(given) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
        except OSError as error:
            raise ValueError(f"{given}: cannot be read as an image ({error}).") from error
    if isinstance(given, (Tensor, np.ndarray, list)):
        try:
            pixels = torch.as_tensor(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected an image, got a {type(given).__name__}, no tensor ({error}).") from error
        if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
            raise ValueError(f"expected an image tensor (3, H, W), got {tuple(pixels.shape)}.")
        pixels = pixels.float() * 255 if pixels.is_floating_point() else pixels.float()
        if not 0 <= float(pixels.min()) <= float(pixels.max()) <= 255:  # NaN is neither
            low, high = float(pixels.min()) / 255, float(pixels.max()) / 255
            raise ValueError(f"expected an image tensor in [0, 1] (or whole numbers up to 255), got {low} to {high}.")
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())
    raise ValueError(f"expected an image (PIL, a path or a tensor), got a {type(given).__name__}.")
