"""Contact sheets: strips of frames with captions and scores."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pixels import enlarge, pixels
from .whole_files import atomically

_MARGIN, _GAP, _FONT_SIZE = 12, 4, 15
_PAPER, _INK, _FAINT, _BETTER, _WORSE = "#e9ecf1", "#1b1f24", "#6b7480", "#127a3a", "#b3261e"


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
    clips = pixels("videos", videos, 5)
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
    first, second = pixels("before", before, 5), pixels("after", after, 5)
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
    images = [Image.fromarray(f) for f in enlarge(clip[picked], min_size)]
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
    return atomically(path, lambda file: image.save(file, formats[suffix]))
