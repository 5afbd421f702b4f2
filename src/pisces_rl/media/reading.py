"""Load video files as tensors."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.stream import Disposition
from torch import Tensor


def load_video(
    path: str | Path | bytes, frames: int | None = None, shape: tuple[int, int, int] | None = None
) -> Tensor:
    """Load a video file as (F, 3, H, W) float in [0, 1], as a player shows it.

    Rotation and mirroring in the header are applied; non-square pixels are resampled in width; transparent parts
    become black; an interlaced frame keeps its upper field, and the lines between are interpolated. The file's colour
    matrix and range are used. HDR is not tone-mapped, and the alpha channel of VP8 and VP9 is not read. Cover art is
    skipped; a picture is a video of one frame.

    Args:
        path: the file's path, or its bytes.
        frames: keep this many frames, those nearest to instants spread evenly in time from the first frame to the
            last; a frame shown for long may be kept more than once. Memory holds only these. A video with no more
            frames than this keeps all of them, as does None.
        shape: (F, H, W) that the file must have; memory never holds more than that, whatever the file contains.

    Raises:
        ValueError: the file is not a video, has no frames, or is truncated; frames is below 1; the shape differs.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames!r} must be at least 1, or None for all.")
    name = f"{len(path)} bytes" if isinstance(path, bytes) else path
    if path == b"" or not isinstance(path, bytes) and os.path.isfile(path) and not os.path.getsize(path):
        raise ValueError(f"{name}: cannot be read as a video (it is empty).")
    count = 0
    try:
        chosen = None
        if frames is not None:  # a first pass for the times: headers lack them or are often wrong
            times = []
            for frame, _ in _decoded(path):
                times.append(frame.pts)
                count = len(times)
            chosen, count = _spread(times, frames), 0
        kept, size = [], None
        for count, (frame, aspect) in enumerate(_decoded(path), 1):
            size = size or (max(1, round(frame.width * aspect)), frame.height)
            if shape is not None and (count > shape[0] or size != shape[:0:-1]):
                raise ValueError(_other_shape(name, f"frame {count} of", size[::-1], shape))
            copies = 1 if chosen is None else chosen.count(count - 1)
            if copies:
                kept += [_shown(frame, *size)] * copies
            if chosen is not None and len(kept) == len(chosen):
                break
    except (av.FFmpegError, OSError) as error:
        where = f" after {count} frames" if count else ""
        fix = (
            "Check the path."
            if isinstance(error, FileNotFoundError)
            else ("Replace the file, or re-encode it, for instance as H.264 in mp4.")
        )
        raise ValueError(f"{name}: cannot be read as a video{where} ({error}). {fix}") from error
    except _NoVideo as error:
        raise ValueError(f"{name}: {error}") from error
    if shape is not None and count < shape[0]:
        raise ValueError(_other_shape(name, f"{count} frames of", size[::-1] if size else shape[1:], shape))
    if not kept:
        raise ValueError(f"{name}: the video has no frames.")
    return torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2).float().div_(255)


def _other_shape(name: str | Path, what: str, size: tuple[int, int], shape: tuple[int, int, int]) -> str:
    return f"{name}: {what} {size[0]} x {size[1]}; expected {shape[0]} frames of {shape[1]} x {shape[2]}."


class _NoVideo(Exception):
    """A media file without a video."""


def _decoded(path: str | Path | bytes) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield the frames of the first stream that is not cover art, each with a pixel's width over its height."""
    if isinstance(path, bytes):
        source = io.BytesIO(path)
    else:  # FFmpeg would read a name with a colon as a protocol
        source = f"file:{path}" if os.path.isfile(path) else str(path)
    with av.open(source) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            cover = ", only a cover picture" if container.streams.video else ""
            raise _NoVideo(f"the file holds no video{cover} ({container.format.long_name}); give a video.")
        aspect = float(streams[0].sample_aspect_ratio or 1)
        for frame in container.decode(streams[0]):
            yield frame, aspect


def _spread(times: Sequence[int | None], count: int) -> list[int]:
    """Return the frames nearest to `count` instants from the first time to the last; by index if times are invalid."""
    if len(times) <= count:
        return list(range(len(times)))
    if None in times or (np.diff(times) <= 0).any():
        times = range(len(times))
    instants = np.linspace(times[0], times[-1], count)
    # round to 6 decimals first: interpolation error must not decide which of two equally near frames is taken
    return np.interp(instants, times, np.arange(len(times))).round(6).round().astype(int).tolist()


def _shown(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Return a decoded frame as a player shows it, (H, W, 3) uint8."""
    transparent = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    image = frame.to_ndarray(format="rgba" if transparent else "rgb24", width=width, height=height)
    if transparent:
        image = (image[..., :3] * (image[..., 3:] / 255)).round().astype(np.uint8)
    if frame.interlaced_frame and height > 2:
        image = image.copy()
        above, below = image[0:-2:2].astype(np.uint16), image[2::2]
        image[1:-1:2] = (above + below + 1) // 2
        if height % 2 == 0:
            image[-1] = image[-2]
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    return image if matrix is None else _turned(image, np.frombuffer(bytes(matrix), np.int32))


def _turned(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a display matrix, which maps column p, row q to column a p + c q, row b p + d q; quarter turns only."""
    a, b, _, c, d = (int(entry) for entry in matrix[:5])
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
