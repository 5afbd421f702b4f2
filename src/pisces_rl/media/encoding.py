"""Videos as files to look at: mp4, GIF, contact sheets, and animated images for TensorBoard.

A video is a float tensor (F, 3, H, W) in [0, 1], a batch (B, F, 3, H, W). Values outside [0, 1] are clipped, values
that are not finite are an error. Files appear whole or not at all.
"""

import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

_CODECS = (("libx264", {"crf": "14", "preset": "veryfast"}), ("h264", {}), ("mpeg4", {"qscale": "2"}))
_MARGIN, _GAP, _FONT_SIZE = 12, 4, 15
_PAPER, _INK, _FAINT, _BETTER, _WORSE = "#e9ecf1", "#1b1f24", "#6b7480", "#127a3a", "#b3261e"


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


def save_video(video: Tensor, path: str | Path, fps: float = 8, min_size: int = 256) -> Path:
    """Write one video as mp4 (H.264 with yuv420p where PyAV has an encoder for it, else MPEG-4).

    Args:
        video: (F, 3, H, W) float in [0, 1].
        path: of the file; its folder is made.
        fps: frames per second.
        min_size: the shorter side is enlarged to at least this many pixels, by a whole factor and nearest neighbour; 0
            keeps the size. Odd sides get one more row or column, since yuv420p needs even ones.

    Returns:
        The path.

    Raises:
        ValueError: a video of another shape or dtype, or with values that are not finite; fps not positive.
    """
    frames = _pixels("video", video, 4)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps!r} must be a positive number, for instance 8.")
    frames = _enlarge(frames, min_size)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    return _atomically(path, lambda file: _encode(frames, file, fps))


def save_gif(video: Tensor, path: str | Path, fps: float = 8, min_size: int = 256) -> Path:
    """Write one video (F, 3, H, W) in [0, 1] as a GIF that loops; arguments and errors as `save_video`'s."""
    data = gif_bytes(video, fps, min_size)
    return _atomically(path, lambda file: file.write(data))


def gif_bytes(video: Tensor, fps: float = 8, min_size: int = 0) -> bytes:
    """One video (F, 3, H, W) in [0, 1] as the bytes of a GIF; arguments and errors as `save_video`'s.

    A GIF counts time in hundredths of a second, so the frame rate is rounded to 100 / round(100 / fps);
    a frame that equals the one before it is stored as a longer one.
    """
    frames = _enlarge(_pixels("video", video, 4), min_size)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps!r} must be a positive number, for instance 8.")
    # one palette for all frames: the colours of a still object must not flicker
    strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    images = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=10 * max(1, round(100 / fps)), loop=0
    )
    return buffer.getvalue()


def contact_sheet(
    videos: Tensor,
    captions: Sequence[str],
    path: str | Path,
    scores: Sequence[float | str | None] | None = None,
    frames: int = 6,
    columns: int | None = None,
    min_size: int = 128,
) -> Path:
    """Write a picture with one strip of frames for each video, under its caption.

    Args:
        videos: (B, F, 3, H, W) float in [0, 1].
        captions: B texts, wrapped to the strip's width.
        path: of the picture; its suffix decides the format (.png).
        scores: B numbers or texts, shown beside the captions; None shows none.
        frames: how many of the F frames are shown, evenly spaced, the first and the last among them.
        columns: strips side by side. None: 2 for more than 4 videos, else 1.
        min_size: the shorter side of a shown frame, in pixels, at least; enlarged by a whole factor. A frame wider
            than 512 pixels is shrunk to that.

    Returns:
        The path.

    Raises:
        ValueError: videos of another shape or dtype, or with values that are not finite; captions or scores that are
            not one for each video; frames or columns below 1.
    """
    clips = _pixels("videos", videos, 5)
    _check_length("captions", captions, len(clips))
    scores = [None] * len(clips) if scores is None else scores
    _check_length("scores", scores, len(clips))
    columns = (2 if len(clips) > 4 else 1) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns!r} must be at least 1.")
    strips = [_strip(clip, frames, min_size) for clip in clips]
    cells = [
        _Cell(caption, [_Row("", strip, _show(score), _INK)])
        for caption, strip, score in zip(captions, strips, scores, strict=True)
    ]
    return _save_image(_sheet(cells, columns), path)


def before_after_sheet(
    before: Tensor,
    after: Tensor,
    captions: Sequence[str],
    path: str | Path,
    before_scores: Sequence[float | None] | None = None,
    after_scores: Sequence[float | None] | None = None,
    frames: int = 6,
    columns: int | None = None,
    min_size: int = 96,
) -> Path:
    """Write a picture with two strips for each prompt: before training above, after training below.

    Args:
        before, after: (B, F, 3, H, W) float in [0, 1], row i of both from one prompt and one noise.
        captions: B prompts.
        path: of the picture.
        before_scores, after_scores: B numbers each, shown beside the strips; the later one is green where it is the
            higher and red where it is the lower. None shows none.
        frames, columns, min_size: as in `contact_sheet`.

    Returns:
        The path.

    Raises:
        ValueError: as `contact_sheet`, and where before and after differ in shape.
    """
    first, second = _pixels("before", before, 5), _pixels("after", after, 5)
    if first.shape != second.shape:
        raise ValueError(
            f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}: both must hold the same prompts."
        )
    _check_length("captions", captions, len(first))
    scores = [[None] * len(first) if s is None else s for s in (before_scores, after_scores)]
    _check_length("before_scores", scores[0], len(first))
    _check_length("after_scores", scores[1], len(first))
    columns = (2 if len(first) > 4 else 1) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns!r} must be at least 1.")
    cells = []
    for i, caption in enumerate(captions):
        old, new = scores[0][i], scores[1][i]
        color = _INK if old is None or new is None or old == new else _BETTER if new > old else _WORSE
        rows = [
            _Row("before", _strip(first[i], frames, min_size), _show(old), _INK),
            _Row("after", _strip(second[i], frames, min_size), _show(new), color),
        ]
        cells.append(_Cell(caption, rows))
    return _save_image(_sheet(cells, columns), path)


def add_gif(writer, tag: str, videos: Tensor, step: int, fps: float = 8) -> None:
    """Log videos to TensorBoard as one animated image.

    torch's own `SummaryWriter.add_video` needs a module that moviepy no longer has, so the GIF goes in as an image.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`.
        tag: name of the image.
        videos: (F, 3, H, W) or (B, F, 3, H, W) float in [0, 1]; a batch is laid out as a grid.
        step: of training.
        fps: frames per second.

    Raises:
        ValueError: videos of another shape or dtype, or with values that are not finite.
    """
    writer._get_file_writer().add_summary(gif_summary(tag, videos, fps), step)


def gif_summary(tag: str, videos: Tensor, fps: float = 8):
    """The protobuf that `add_gif` writes: a TensorBoard image summary whose bytes are a GIF; arguments as there."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if isinstance(videos, Tensor) and videos.ndim == 5:
        videos = _grid(videos)
    data = gif_bytes(videos, fps)
    height, width = videos.shape[-2:]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _pixels(name: str, video: Tensor, ndim: int) -> np.ndarray:
    """A checked video as uint8, channels last."""
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


def _enlarge(frames: np.ndarray, min_size: int) -> np.ndarray:
    factor = math.ceil(min_size / min(frames.shape[-3:-1])) if min_size else 1
    return frames if factor <= 1 else frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _encode(frames: np.ndarray, file, fps: float) -> None:
    """frames (F, H, W, 3) uint8 with even sides -> an mp4 in an open file."""
    codec, options = next((c, o) for c, o in _CODECS if _has_encoder(c))
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=_rate(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _rate(fps: float):
    return Fraction(fps).limit_denominator(1001)


def _has_encoder(name: str) -> bool:
    try:
        return av.Codec(name, "w") is not None
    except Exception:  # the class that PyAV raises has moved between versions
        return False


def _grid(videos: Tensor) -> Tensor:
    """(B, F, 3, H, W) -> (F, 3, rows * H, columns * W), missing cells mid-gray."""
    columns = math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    missing = videos.new_full((rows * columns - len(videos), *videos.shape[1:]), 0.5)
    cells = torch.cat([videos, missing]).unflatten(0, (rows, columns))
    return cells.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


class _Row:
    """One strip with a label before it and a score after it."""

    def __init__(self, label: str, strip: Image.Image, score: str, color: str):
        self.label, self.strip, self.score, self.color = label, strip, score, color


class _Cell:
    """One prompt with its rows."""

    def __init__(self, caption: str, rows: list[_Row]):
        self.caption, self.rows = str(caption), rows


def _strip(clip: np.ndarray, frames: int, min_size: int) -> Image.Image:
    """(F, H, W, 3) uint8 -> evenly spaced frames side by side."""
    if frames < 1:
        raise ValueError(f"frames={frames!r} must be at least 1.")
    picked = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    images = [Image.fromarray(f) for f in _enlarge(clip[picked], min_size)]
    if images[0].width > 512:
        height = round(images[0].height * 512 / images[0].width)
        images = [image.resize((512, height), Image.Resampling.LANCZOS) for image in images]
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, height), _PAPER)
    for i, image in enumerate(images):
        strip.paste(image, (i * (width + _GAP), 0))
    return strip


def _sheet(cells: list[_Cell], columns: int) -> Image.Image:
    """Cells of equal strips in a grid, on white."""
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + 5
    rows = [row for cell in cells for row in cell.rows]
    label = max((font.getlength(row.label) for row in rows), default=0)
    label = math.ceil(label) + 8 if label else 0
    score = max((font.getlength(row.score) for row in rows), default=0)
    score = math.ceil(score) + 8 if score else 0
    strip_width = max(max(row.strip.width for row in rows), 160)
    width = label + strip_width + score
    wrapped = [_wrap(cell.caption, font, width) for cell in cells]
    columns = min(columns, len(cells))
    heights = []
    for start in range(0, len(cells), columns):
        group = range(start, min(start + columns, len(cells)))
        strips = max(sum(row.strip.height + _GAP for row in cells[i].rows) for i in group)
        heights.append((max(len(wrapped[i]) for i in group) * line, strips))
    total = sum(text + strips + _MARGIN for text, strips in heights) + _MARGIN
    image = Image.new("RGB", (columns * (width + 2 * _MARGIN), total), _PAPER)
    draw = ImageDraw.Draw(image)
    y = _MARGIN
    for r, (text, strips) in enumerate(heights):
        for c, i in enumerate(range(r * columns, min((r + 1) * columns, len(cells)))):
            x = c * (width + 2 * _MARGIN) + _MARGIN
            for k, words in enumerate(wrapped[i]):
                draw.text((x, y + text - (len(wrapped[i]) - k) * line), words, fill=_INK, font=font)
            top = y + text
            for row in cells[i].rows:
                middle = top + row.strip.height / 2
                draw.text((x, middle), row.label, fill=_FAINT, font=font, anchor="lm")
                image.paste(row.strip, (x + label, top))
                draw.text((x + label + row.strip.width + 8, middle), row.score, fill=row.color, font=font, anchor="lm")
                top += row.strip.height + _GAP
        y += text + strips + _MARGIN
    return image


def _wrap(text: str, font, width: float) -> list[str]:
    """Lines no wider than `width` pixels; a word that alone is wider is cut."""
    lines, line = [], ""
    for word in text.split() or [""]:
        while font.getlength(word) > width and len(word) > 1:
            fits = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width)
            if line:
                lines.append(line)
                line = ""
            lines.append(word[:fits])
            word = word[fits:]
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def _show(score: float | str | None) -> str:
    if score is None:
        return ""
    return score if isinstance(score, str) else f"{float(score):.2f}"


def _check_length(name: str, values: Sequence, wanted: int) -> None:
    if isinstance(values, str) or len(values) != wanted:
        raise ValueError(f"{name} holds {len(values)} entries for {wanted} videos: give one for each.")


def _save_image(image: Image.Image, path: str | Path) -> Path:
    formats = Image.registered_extensions()
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise ValueError(f"path={str(path)!r} has no suffix of a picture format; allowed: for instance .png.")
    return _atomically(path, lambda file: image.save(file, formats[suffix]))


def _atomically(path: str | Path, write: Callable) -> Path:
    """Write through a temporary file beside `path`, which then takes its place; nothing is left after a failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
