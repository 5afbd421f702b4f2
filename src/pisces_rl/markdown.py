"""Text of users inside Markdown: it stays the text that it is."""

import re
from urllib.parse import quote

# Of ASCII punctuation, which CommonMark lets a backslash escape, what CommonMark, GitHub or the Hub read as markup.
# An underscore inside a word is none; a colon is one in `https://` and `:name:`, a dot in `www.`.
_MARKUP = re.compile(r"""[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.|@(?=\w)""", re.IGNORECASE)


def one_line(value) -> str:
    """The value as text on one line: any run of line breaks and spaces is a space; what cannot be shown or encoded is
    U+FFFD."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c > "\u00ff" else "\ufffd" for c in text)


def escape(value) -> str:
    """The value inside a paragraph, heading, list item, link's text or table cell (not at the start of a line)."""
    return _MARKUP.sub(r"\\\g<0>", one_line(value))


def code(value) -> str:
    """The value as a code span, which no backtick inside it ends."""
    text = one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def target(path: str) -> str:
    """A relative path as the target of a link."""
    return quote(path, errors="replace")
