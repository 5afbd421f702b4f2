"""Load pictures as PIL images."""

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def load_image(given) -> Image.Image:
    """Return an RGB picture from a PIL image, a path, or a tensor (3, H, W) in [0, 1] or of whole numbers up to 255.

    EXIF orientation is applied; transparent parts become black; 16 bits become 8; of an animation the first frame is
    used.

    Raises:
        ValueError: `given` is anything else, or a file that is not a picture or is broken.
    """
    if isinstance(given, Image.Image):
        return _rgb(given)
    if isinstance(given, (str, os.PathLike)):
        try:
            with Image.open(given) as opened:
                return _rgb(opened)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{given}: the picture is too large ({error}); scale it down first.") from error
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise ValueError(f"{given}: cannot be read as an image ({error}).") from error
    if isinstance(given, (Tensor, np.ndarray, list)):
        try:
            pixels = torch.as_tensor(given)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected an image, got a {type(given).__name__} that is not a tensor ({error})."
            ) from error
        if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
            raise ValueError(f"expected an image tensor (3, H, W), got {tuple(pixels.shape)}.")
        pixels = pixels.float() * 255 if pixels.is_floating_point() else pixels.float()
        if not 0 <= float(pixels.min()) <= float(pixels.max()) <= 255:  # also true for NaN
            low, high = float(pixels.min()) / 255, float(pixels.max()) / 255
            raise ValueError(f"expected an image tensor in [0, 1] (or whole numbers up to 255), got {low} to {high}.")
        return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())
    raise ValueError(f"expected an image (PIL, a path or a tensor), got a {type(given).__name__}.")


def _rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        low, high = picture.getextrema()
        if not 0 <= low <= high <= 255:
            raise ValueError(f"its values go from {low:g} to {high:g} in mode {picture.mode!r}; save it with 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("RGB")
