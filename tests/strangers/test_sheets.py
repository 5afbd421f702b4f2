"""Contact sheets with captions and scores as people and language models write them.

The cases come from the issue trackers of Pillow, matplotlib and TensorBoard: missing glyphs, right-to-left text,
combining marks, control characters, captions without spaces.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from pisces_rl import media
from pisces_rl.media import captions

CHINESE = "\u4e00\u53ea\u6234\u7740\u7ea2\u8272\u5e3d\u5b50\u7684\u732b"  # a cat with a red hat


@pytest.fixture
def videos():
    return torch.full((1, 4, 3, 32, 32), 0.5)


@pytest.fixture
def latin_only(monkeypatch):
    """A container without fonts: there is Pillow's own."""
    monkeypatch.setattr(captions, "_FONTS", ())
    captions.fonts.cache_clear()
    captions.shows.cache_clear()
    yield
    monkeypatch.undo()
    captions.fonts.cache_clear()
    captions.shows.cache_clear()


def lines(text, width=500, **options):
    found, font, whole = captions.wrapped(text, width, **options)
    assert all(font.getlength(line) <= width for line in found)
    return found, whole


# --- long captions ---


@pytest.mark.parametrize("unit", ["\u4e00", "x", "word ", "e\u0301", "\u200b", "\U0001f638"])
def test_the_time_of_a_long_caption(tmp_path, videos, unit):
    """2,000 characters of Chinese took 303 s; 200,000 take no longer than a short caption."""
    for count in (2_000, 20_000, 200_000):
        start = time.monotonic()
        media.contact_sheet(videos, [unit * count], tmp_path / "sheet.png")
        assert time.monotonic() - start < 3
    height = Image.open(tmp_path / "sheet.png").height
    assert height < 128 + 20 * (captions.MAX_LINES + 3)


def test_a_cut_caption_is_written_to_a_file_next_to_the_picture(tmp_path, videos):
    """Twelve lines, an ellipsis, and the whole text in a file."""
    text = " ".join(f"word{i}" for i in range(2000))
    path = media.contact_sheet(videos.repeat(2, 1, 1, 1, 1), ["short", text], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.captions.txt").read_text(encoding="utf-8") == f"1: short\n2: {text}\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["sheet.captions.txt", "sheet.png"]
    found, whole = lines(text)
    assert len(found) == captions.MAX_LINES and found[-1].endswith(" ...") and not whole
    assert found[0].startswith("word0 word1 ")


def test_short_captions_leave_no_file(tmp_path, videos):
    """The ordinary sheet is one file."""
    media.contact_sheet(videos, ["a red circle moves to the right"], tmp_path / "sheet.png", scores=[0.5])
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_words_stay_whole_and_long_ones_are_cut():
    """Nothing is lost: the lines joined are the text."""
    found, whole = lines("a red circle " * 10)
    assert whole and " ".join(found) == ("a red circle " * 10).strip()
    found, whole = lines("see " + "x" * 300)
    assert whole and len(found) > 2 and found[0] == "see" and "".join(found[1:]) == "x" * 300
    assert lines("") == ([""], True) and lines(" \n\t") == ([""], True)


def test_marks_stay_with_their_letter():
    """A line must not begin with the accent of the letter before."""
    found, _ = lines("q\u0301" * 300)
    assert not any(line.startswith("\u0301") for line in found)


# --- letters that the font lacks ---


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (CHINESE, "[10 CJK characters]"),
        (f"{CHINESE} in 4K", "[10 CJK characters] in 4K"),
        ("a cat \U0001f638 runs", "a cat [grinning cat face with smiling eyes] runs"),
        ("\u3072\u3089\u304c\u306a\u3068\u6f22\u5b57", "[7 Hiragana, CJK characters]"),
        ("\uace0\uc591\uc774", "[3 Hangul characters]"),
        ("\u4e00", "[1 CJK character]"),
    ],
)
def test_without_a_font_the_caption_says_what_is_missing(tmp_path, videos, latin_only, text, wanted):
    """A row of equal boxes did not show which video was which."""
    assert lines(text) == ([wanted], False)
    media.contact_sheet(videos, [text], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.captions.txt").read_text(encoding="utf-8") == f"1: {text}\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a caf\u00e9 \u2013 na\u00efve", "a cafe - naive"),
        ("e\u0301te\u0301", "ete"),
        ("\uff21\uff0c b", "A, b"),
    ],
)
def test_without_a_font_accents_go(latin_only, text, wanted):
    """Pillow's own font has no e with an accent and no dash."""
    assert lines(text) == ([wanted], True)


def test_a_font_of_the_machine_is_taken(tmp_path, monkeypatch):
    """Folders of fonts are searched, broken fonts passed over, and the font that shows most is taken."""
    known = captions.fonts()[1:]  # none on a bare machine, which uses Pillow's font
    font = Path(known[0].path).read_bytes() if known else ImageFont.load_default(15).path.getvalue()
    (tmp_path / "fonts" / "deep").mkdir(parents=True)
    (tmp_path / "fonts" / "deep" / "unifont.ttf").write_bytes(b"broken")
    (tmp_path / "fonts" / "deep" / "msyh.ttc").write_bytes(font)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    captions.fonts.cache_clear()
    captions.shows.cache_clear()
    found = [getattr(font, "path", None) for font in captions.fonts()]
    assert str(tmp_path / "fonts" / "deep" / "msyh.ttc") in map(str, found)
    text = next((t for t in ("\u043a\u043e\u0442", CHINESE) if all(captions.shows(1, c) for c in t)), None)
    if text:
        lines_, font, whole = captions.wrapped(text, 500)
        assert whole and lines_ == [text] and font is not captions.fonts()[0]
    monkeypatch.undo()
    captions.fonts.cache_clear()
    captions.shows.cache_clear()


def test_latin_captions_keep_their_font():
    """A sheet of English looks as it did, whichever fonts are there."""
    _, font, whole = captions.wrapped('a cafe: 50 % "red", it\'s 1 + 1 = 2', 500)
    assert whole and font.getname() == ImageFont.load_default(15).getname()


# --- what must not be drawn ---


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\nb\r\nc\td", "a b c d"),
        ("a\x00\x07b\x1b[31m", "a b [31m"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("\ufeffa\u200bb", "ab"),
        ("a \ufe0f b", "a b"),
        ("a\u2028b", "a b"),
    ],
)
def test_characters_without_a_picture(text, wanted):
    """Line ends, escapes, marks of direction: they drew boxes or turned the caption round."""
    assert lines(text) == ([wanted], True)


def test_half_of_a_surrogate_pair(tmp_path, videos):
    """A tokenizer cut an emoji in two; Pillow and the file refused it."""
    media.contact_sheet(videos, ["a \ud83d b " + "long " * 2000], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.captions.txt").read_text(encoding="utf-8").startswith("1: a ? b long")


@pytest.mark.parametrize(
    "text",
    [
        "\u0643\u0644\u0628 \u05e9\u05dc\u05d5\u05dd",
        "\u0915\u094d\u0937",
        "e" + "\u0301" * 500,
    ],
)
def test_other_scripts_draw_something(tmp_path, videos, text):
    """Arabic, Hebrew, Devanagari, and an e with 500 accents."""
    with Image.open(media.contact_sheet(videos, [text], tmp_path / "sheet.png")) as picture:
        assert (np.asarray(picture.convert("L"))[:32] < 160).any()


# --- scores ---


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (0.5, "0.50"),
        (-3, "-3.00"),
        (0, "0.00"),
        (1e9, "1e+09"),
        (-1e9, "-1e+09"),
        (1e-5, "1e-05"),
        (123456.7, "123456.70"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (torch.tensor(0.25), "0.25"),
        ("best", "best"),
        (None, ""),
        ("x" * 10_000, None),
    ],
)
def test_scores(tmp_path, videos, score, shown):
    """1e9 took half of the sheet, 1e-5 was 0.00, a long text made it as wide as the text."""
    from pisces_rl.media.sheets import _show

    text = _show(score)
    assert len(text.lines) == 1 and text.width <= 320
    assert shown is None or text.lines == [shown]
    with Image.open(media.contact_sheet(videos, ["a"], tmp_path / "sheet.png", scores=[score])) as picture:
        assert picture.width < 1000


def test_no_color_where_a_score_is_nan(tmp_path, videos):
    """NaN after training is neither green nor red."""
    nan = float("nan")
    for before, after in ((nan, 1.0), (1.0, nan), (nan, nan), (None, 1.0)):
        path = media.before_after_sheet(videos, videos, ["a"], tmp_path / "s.png", [before], [after])
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert (pixels.max(-1) - pixels.min(-1)).max() < 40
