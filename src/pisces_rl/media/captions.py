"""Break captions into lines that this machine's fonts can show."""

import contextlib
import functools
import os
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import ImageFont

FONT_SIZE = 15
MAX_LINES = 12
# besides Pillow's own Latin font: fonts with many scripts, the smaller ones first
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "FreeSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSans-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "unifont.otf",
    "unifont.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "arialuni.ttf",
)


@functools.cache
def fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    """Return Pillow's own font, then those of _FONTS found in the usual font folders."""
    data = [
        os.environ.get("XDG_DATA_HOME") or "~/.local/share",
        *(os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":"),
    ]
    folders = [
        *(f"{folder}/fonts" for folder in data),
        "~/.fonts",
        "/System/Library/Fonts",
        "/Library/Fonts",
        "C:/Windows/Fonts",
    ]
    found = {path.name: path for folder in folders for path in Path(folder).expanduser().rglob("*.[to]t[fc]")}
    opened = [ImageFont.load_default(FONT_SIZE)]
    for name in _FONTS:
        if name in found:
            with contextlib.suppress(OSError):  # skip a broken font
                opened.append(ImageFont.truetype(found[name], FONT_SIZE))
    return tuple(opened)


@functools.lru_cache(65536)
def shows(number: int, character: str) -> bool:
    """Return whether font `number` has a glyph for a character, other than the one for an undefined character."""
    font = fonts()[number]
    (mask, offset), (none, no_offset) = (font.getmask2(c) for c in (character, "\U0010ffff"))
    return character.isspace() or (mask.size, offset, bytes(mask)) != (none.size, no_offset, bytes(none))


def wrapped(text: str, width: float, max_lines: int = MAX_LINES) -> tuple[list[str], ImageFont.FreeTypeFont, bool]:
    """Break a caption into lines no wider than `width` pixels, in the font that shows most of its characters.

    Characters that the font lacks are replaced: letters lose their accents, symbols become their names, and other
    letters become a count and their script. Text beyond `max_lines` becomes an ellipsis.

    Returns:
        The lines, the font, and whether the lines show all of the caption.
    """
    limit = int(max_lines * width)  # more characters cannot fit: hardly any is narrower than a pixel
    text, whole = _clean(text[:limit]), len(text) <= limit
    missing = [{c for c in set(text) if not shows(number, c)} for number in range(len(fonts()))]
    number = min(range(len(fonts())), key=lambda n: sum(map(text.count, missing[n])))
    font = fonts()[number]
    if missing[number]:
        text = "".join(_plain(c, number) if c in missing[number] else c for c in text)
        lacking = {c for c in set(text) if not shows(number, c)}
        if lacking:
            text, whole = _named(text, lacking), False
    lines = []
    for line in _lines(text, font, width):
        if len(lines) == max_lines:
            lines[-1] = f"{_fitting(lines[-1], font, width - font.getlength(' ...'))} ..."
            return lines, font, False
        lines.append(line)
    return lines, font, whole


def _clean(text: str) -> str:
    """Remove line ends, control characters, and direction and variation marks, which fonts draw as boxes."""
    instead = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd", "Cf": ""}
    kept = (instead.get(unicodedata.category(c), c) for c in text if not "\ufe00" <= c <= "\ufe0f")
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def _plain(character: str, number: int) -> str:
    """Return a letter without its accents or a hyphen for a dash; the character itself if the font lacks that too."""
    if unicodedata.category(character) == "Pd":
        return "-"
    letters = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    return letters if all(shows(number, c) for c in letters) else character


def _named(text: str, missing: set[str]) -> str:
    """Replace runs of missing characters by words: "[12 CJK characters]", "[grinning cat face]"."""
    parts = []
    kinds = {c: "symbol" if unicodedata.category(c)[0] == "S" else "text" for c in missing}
    for kind, run in groupby(text, kinds.get):
        run = list(run)
        if not kind:
            parts.append("".join(run))
        elif kind == "symbol":
            parts += [f" [{unicodedata.name(c, 'unknown symbol').lower()}] " for c in run]
        else:
            words = (unicodedata.name(c, "UNKNOWN").split()[0] for c in run)
            scripts = dict.fromkeys(word if word == "CJK" else word.capitalize() for word in words)
            parts.append(f" [{len(run)} {', '.join(scripts)} character{'s' * (len(run) > 1)}] ")
    return " ".join("".join(parts).split())


def _lines(text: str, font, width: float) -> Iterator[str]:
    """Yield lines of whole words; a word wider than a line is cut."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if len(word) <= width and font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        while word != (start := _fitting(word, font, width)):
            yield start
            word = word[len(start) :]
        line = word
    yield line


def _fitting(word: str, font, width: float) -> str:
    """Return the start of a word that fits in `width`, at least one character; marks stay with their letter."""
    start = word[: max(1, int(width))]  # measuring all of a long word each time would take quadratic time
    low, high = 1, len(start)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(start[:middle]) <= width else (low, middle - 1)
    end = low
    while end > 1 and end < len(word) and unicodedata.category(word[end])[0] == "M":
        end -= 1
    return word[: end if end > 1 else low]
