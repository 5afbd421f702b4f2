"""Escape users' text in Markdown, so that it renders as written."""

import re
from urllib.parse import quote

# ASCII punctuation that CommonMark, GitHub or the Hub reads as markup; CommonMark lets a backslash escape it.
# An underscore inside a word is not markup; a colon is in `https://` and `:name:`, a dot in `www.`.
_MARKUP = re.compile(r"""[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.|@(?=\w)""", re.IGNORECASE)


def one_line(value) -> str:
    """Return the value as one line of text: a run of line breaks and spaces becomes a space; a character that cannot
    be shown or encoded becomes U+FFFD."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c > "\u00ff" else "\ufffd" for c in text)


def escape(value) -> str:
    """Escape a value for a paragraph, heading, list item, link text or table cell (not at the start of a line)."""
    return _MARKUP.sub(r"\\\g<0>", one_line(value))


def code(value) -> str:
    """Return the value as a code span that no backtick inside it ends."""
    text = one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def target(path: str) -> str:
    """Quote a relative path as a link target."""
    return quote(path, errors="replace")
