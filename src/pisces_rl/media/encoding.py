"""Write videos as mp4 and GIF files, and as animated images for TensorBoard."""

import io
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from ..whole_files import atomically
from .pixels import enlarge, pixels

# software encoders only: "h264" may need a GPU that is missing. With mbtree, libx264's output also depends on memory
# that it never wrote, so the same video gives other bytes from call to call. Without it, crf 14 makes larger files.
_CODECS = (
    ("libx264", {"crf": "15", "preset": "veryfast", "mbtree": "0"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "2"}),
)


def save_video(video: Tensor, path: str | Path, fps: float = 8, min_size: int = 256) -> Path:
    """Write one video as mp4 (H.264 with yuv420p if PyAV has an encoder for it, else MPEG-4).

    Args:
        video: (F, 3, H, W) float in [0, 1].
        path: the file to write; its folder is created.
        fps: frames per second.
        min_size: enlarge the shorter side to at least this many pixels, by an integer factor and nearest neighbour; 0
            keeps the size. Odd sides get one more row or column, since yuv420p needs even ones.

    Returns:
        The path.

    Raises:
        ValueError: the video has another shape or dtype, or non-finite values; fps is outside 0.01 to 1000; or PyAV
            has no encoder.
    """
    data = mp4_bytes(video, fps, min_size)
    return atomically(path, lambda file: file.write(data))


def mp4_bytes(video: Tensor, fps: float = 8, min_size: int = 256) -> bytes:
    """Return one video (F, 3, H, W) in [0, 1] as the bytes of an mp4; arguments and errors as in `save_video`."""
    frames = pixels("video", video, 4)
    _check_fps(fps)
    frames = enlarge(frames, min_size)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    _encode(frames, buffer, fps)
    return buffer.getvalue()


def save_gif(video: Tensor, path: str | Path, fps: float = 8, min_size: int = 256) -> Path:
    """Write one video (F, 3, H, W) in [0, 1] as a looping GIF; arguments and errors as in `save_video`."""
    data = gif_bytes(video, fps, min_size)
    return atomically(path, lambda file: file.write(data))


def gif_bytes(video: Tensor, fps: float = 8, min_size: int = 0) -> bytes:
    """Return one video (F, 3, H, W) in [0, 1] as the bytes of a GIF; arguments and errors as in `save_video`.

    A GIF counts time in hundredths of a second, so the frame rate is rounded to 100 / round(100 / fps). A frame equal
    to the one before it only lengthens that one.
    """
    frames = enlarge(pixels("video", video, 4), min_size)
    _check_fps(fps)
    # one palette for all frames: the colours of a still object must not flicker
    strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    images = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=10 * max(1, round(100 / fps)), loop=0
    )
    return buffer.getvalue()


def add_gif(writer, tag: str, videos: Tensor, step: int, fps: float = 8) -> None:
    """Log videos to TensorBoard as one animated image.

    `SummaryWriter.add_video` needs a module that moviepy no longer has, so the GIF is logged as an image.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
        tag: name of the image.
        videos: (F, 3, H, W) or (B, F, 3, H, W) float in [0, 1]; a batch is laid out as a grid.
        step: training step.
        fps: frames per second.

    Raises:
        ValueError: videos have another shape or dtype, or non-finite values.
    """
    writer._get_file_writer().add_summary(gif_summary(tag, videos, fps), step)


def gif_summary(tag: str, videos: Tensor, fps: float = 8):
    """Return the protobuf that `add_gif` writes, a TensorBoard image summary that holds a GIF; arguments as there."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if isinstance(videos, Tensor) and videos.ndim == 5 and videos.numel():
        videos = _grid(videos)
    data = gif_bytes(videos, fps)
    height, width = videos.shape[-2:]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _encode(frames: np.ndarray, file: io.BytesIO, fps: float) -> None:
    """Write frames (F, H, W, 3), uint8 with even sides, to `file` as mp4."""
    codec, options = _mp4_encoder()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=_rate(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # the matrix and range that the conversion below uses; without tags a player may guess others and shift colours
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU601, ColorRange.MPEG
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def check_mp4(fps: float) -> None:
    """Raise a ValueError if `save_video` cannot write at this frame rate or has no encoder; to check before a run."""
    _check_fps(fps)
    _mp4_encoder()


def _mp4_encoder() -> tuple[str, dict[str, str]]:
    for codec, options in _CODECS:
        if has_encoder(codec):
            return codec, options
    raise ValueError(
        f"mp4 files need one of the encoders {', '.join(codec for codec, _ in _CODECS)}, but PyAV {av.__version__} "
        "as installed here has none of them. Install PyAV from PyPI, which has libx264 (pip install "
        "--force-reinstall --only-binary av av), use save_gif, or train with num_sample_videos=0."
    )


def _check_fps(fps: float) -> None:
    if not 0.01 <= fps <= 1000:  # also true for NaN
        raise ValueError(f"fps={fps!r} must be a number from 0.01 to 1000, for instance 8.")


def _rate(fps: float):
    return Fraction(fps).limit_denominator(1001)


def has_encoder(name: str) -> bool:
    try:
        return av.Codec(name, "w") is not None
    except Exception:  # PyAV's exception class has moved between versions
        return False


def _grid(videos: Tensor) -> Tensor:
    """Lay (B, F, 3, H, W) out as (F, 3, rows * H, columns * W), with missing cells mid-gray."""
    columns = math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    missing = videos.new_full((rows * columns - len(videos), *videos.shape[1:]), 0.5)
    cells = torch.cat([videos, missing]).unflatten(0, (rows, columns))
    return cells.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
