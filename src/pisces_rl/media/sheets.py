"""Contact sheets: strips of frames with captions and scores."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..whole_files import atomically
from .captions import FONT_SIZE, MAX_LINES, fonts, wrapped
from .pixels import enlarge, pixels

_MARGIN, _GAP = 12, 4
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
    """Write a picture with one strip of frames per video, under its caption.

    Args:
        videos: (B, F, 3, H, W) float in [0, 1].
        captions: B texts, wrapped to the strip's width, in an installed font that can show them. If there is none
            (install Noto Sans CJK, for instance), or a text has more than 12 lines, the picture says so, and all
            captions are written beside it, to NAME.captions.txt.
        path: the picture to write; its suffix decides the format (.png).
        scores: B numbers or texts, shown beside the strips; None shows none.
        frames: how many of the F frames to show, evenly spaced, including the first and the last.
        columns: strips side by side; None means 2 for more than 4 videos, else 1.
        min_size: enlarge the shorter side of a frame to at least this many pixels, by an integer factor. A frame wider
            than 512 pixels is shrunk to that.

    Returns:
        The path.

    Raises:
        ValueError: videos have another shape or dtype, or non-finite values; captions or scores are not one per
            video; frames or columns is below 1.
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
    return _save_sheet(cells, columns, path)


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
    """Write a picture with two strips per prompt: before training above, after training below.

    Args:
        before: (B, F, 3, H, W) float in [0, 1].
        after: same shape as `before`; row i of both comes from the same prompt and noise.
        captions: B prompts.
        path: the picture to write.
        before_scores: B numbers, shown beside the strips; None shows none.
        after_scores: B numbers, shown green if higher than before and red if lower; None shows none.
        frames: as in `contact_sheet`.
        columns: as in `contact_sheet`.
        min_size: as in `contact_sheet`.

    Returns:
        The path.

    Raises:
        ValueError: as in `contact_sheet`, and if before and after differ in shape.
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
        color = _INK  # also if a score is missing or NaN
        if old is not None and new is not None:
            color = _BETTER if new > old else _WORSE if new < old else _INK
        rows = [
            _Row("before", _strip(first[i], frames, min_size), _show(old), _INK),
            _Row("after", _strip(second[i], frames, min_size), _show(new), color),
        ]
        cells.append(_Cell(caption, rows))
    return _save_sheet(cells, columns, path)


class _Text:
    """Lines of a text, in the font that shows most of it; `whole` says whether they show all of it."""

    def __init__(self, text: str, width: float, max_lines: int = MAX_LINES):
        self.lines, self.font, self.whole = wrapped(text, width, max_lines)

    @property
    def width(self) -> float:
        return max(map(self.font.getlength, self.lines))


class _Row:
    """One strip, with a label to its left and a score to its right."""

    def __init__(self, label: str, strip: Image.Image, score: _Text, color: str):
        self.label, self.strip, self.score, self.color = label, strip, score, color


class _Cell:
    """One prompt with its rows."""

    def __init__(self, caption: str, rows: list[_Row]):
        self.caption, self.rows = str(caption), rows


def _strip(clip: np.ndarray, frames: int, min_size: int) -> Image.Image:
    """Return evenly spaced frames of a clip (F, H, W, 3), uint8, side by side."""
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


def _save_sheet(cells: list[_Cell], columns: int, path: str | Path) -> Path:
    """Save the picture; if it does not show every caption in full, save all captions beside it."""
    path = Path(path)
    captions = path.with_suffix(".captions.txt")
    sheet, whole = _sheet(cells, columns, captions.name)
    path = _save_image(sheet, path)
    if not whole:
        text = "".join(f"{i}: {cell.caption}\n" for i, cell in enumerate(cells, 1))
        atomically(captions, lambda file: file.write(text.encode(errors="replace")))  # a lone surrogate has no UTF-8
    return path


def _sheet(cells: list[_Cell], columns: int, captions: str) -> tuple[Image.Image, bool]:
    """Draw cells in a grid; return the picture and whether it shows every caption in full.

    Args:
        cells: with strips of equal size.
        columns: cells side by side.
        captions: name of the file that holds the captions in full, for a note under a shortened caption.
    """
    font = fonts()[0]
    line = FONT_SIZE + 5
    rows = [row for cell in cells for row in cell.rows]
    label = max((font.getlength(row.label) for row in rows), default=0)
    label = math.ceil(label) + 8 if label else 0
    score = max((row.score.width for row in rows), default=0)
    score = math.ceil(score) + 8 if score else 0
    strip_width = max(max(row.strip.width for row in rows), 160)
    width = label + strip_width + score
    texts = [_Text(cell.caption, width) for cell in cells]
    blocks = [[(words, _INK, text.font) for words in text.lines] for text in texts]
    for i, (block, text) in enumerate(zip(blocks, texts), 1):
        if not text.whole:
            note = _Text(f"(in full: {captions}, {i})", width)
            block += [(words, _FAINT, note.font) for words in note.lines]
    columns = min(columns, len(cells))
    heights = []
    for start in range(0, len(cells), columns):
        group = range(start, min(start + columns, len(cells)))
        strips = max(sum(row.strip.height + _GAP for row in cells[i].rows) for i in group)
        heights.append((max(len(blocks[i]) for i in group) * line, strips))
    total = sum(text + strips + _MARGIN for text, strips in heights) + _MARGIN
    image = Image.new("RGB", (columns * (width + 2 * _MARGIN), total), _PAPER)
    draw = ImageDraw.Draw(image)
    y = _MARGIN
    for r, (text, strips) in enumerate(heights):
        for c, i in enumerate(range(r * columns, min((r + 1) * columns, len(cells)))):
            x = c * (width + 2 * _MARGIN) + _MARGIN
            for k, (words, color, own) in enumerate(blocks[i]):
                draw.text((x, y + text - (len(blocks[i]) - k) * line), words, fill=color, font=own)
            top = y + text
            for row in cells[i].rows:
                middle = top + row.strip.height / 2
                draw.text((x, middle), row.label, fill=_FAINT, font=font, anchor="lm")
                image.paste(row.strip, (x + label, top))
                draw.text(
                    (x + label + row.strip.width + 8, middle),
                    row.score.lines[0],
                    fill=row.color,
                    font=row.score.font,
                    anchor="lm",
                )
                top += row.strip.height + _GAP
        y += text + strips + _MARGIN
    return image, all(text.whole for text in texts)


def _show(score: float | str | None) -> "_Text":
    if score is None:
        return _Text("", 320)
    if isinstance(score, str):
        return _Text(score, 320, max_lines=1)
    score = float(score)
    plain = score == 0 or 0.005 <= abs(score) < 1e6  # false for NaN and infinity
    return _Text(f"{score:.2f}" if plain else f"{score:.3g}", 320)


def _check_length(name: str, values: Sequence, wanted: int) -> None:
    if isinstance(values, str) or len(values) != wanted:
        raise ValueError(f"{name} holds {len(values)} entries for {wanted} videos: give one per video.")


def _save_image(image: Image.Image, path: str | Path) -> Path:
    formats = Image.registered_extensions()
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise ValueError(f"path={str(path)!r} has no suffix of a picture format; use one such as .png.")
    return atomically(path, lambda file: image.save(file, formats[suffix]))
