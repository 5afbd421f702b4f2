"""Read videos, and write them for viewing: mp4, GIF, contact sheets, and animated images for TensorBoard.

A video is a float tensor (F, 3, H, W) in [0, 1], a batch (B, F, 3, H, W). Values outside [0, 1] are clipped;
non-finite values are an error. Files appear whole or not at all.
"""

from .encoding import add_gif, check_mp4, gif_bytes, gif_summary, mp4_bytes, save_gif, save_video
from .pictures import load_image
from .reading import load_video
from .sheets import before_after_sheet, contact_sheet

__all__ = [
    "add_gif",
    "before_after_sheet",
    "check_mp4",
    "contact_sheet",
    "gif_bytes",
    "gif_summary",
    "load_image",
    "load_video",
    "mp4_bytes",
    "save_gif",
    "save_video",
]
