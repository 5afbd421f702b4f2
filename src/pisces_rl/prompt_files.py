"""Read prompt files (lines, CSV, JSON) as tables."""

import codecs
import csv
import io
import json
import os
import re
from pathlib import Path

import pandas
from datasets import Dataset

PROMPT_FILES = (".txt", ".csv", ".json", ".jsonl")
_LINE_END = re.compile(r"\r\n?|\n")  # splitlines would also cut at U+2028 and others
_SPACE = re.compile(r"\s*")
_SAVE_AS = "Save the file as UTF-8, for instance with `iconv -f CP1252 -t UTF-8` or `iconv -f UTF-16LE -t UTF-8`."


def read_prompt_file(source: str, column: str) -> Dataset:
    """Read a file of a type in PROMPT_FILES; lines of a .txt and lists of strings become the column `column`.

    Raises:
        ValueError: the file is missing or cannot be read; the message names the file, the line and the fix.
    """
    if not os.path.isfile(source):
        raise ValueError(f"dataset={source!r}: no such file.")
    text = _text(source)
    suffix = Path(source).suffix.lower()
    if suffix == ".txt":
        lines = [line.strip() for line in _LINE_END.split(text)]
        return Dataset.from_dict({column: [line for line in lines if line]})
    if not text.strip():
        return Dataset.from_dict({column: []})
    return (_csv if suffix == ".csv" else _json)(source, text, column)


def _text(source: str) -> str:
    data = Path(source).read_bytes()
    encoding = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "UTF-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line(data[: error.start].decode(encoding, errors="replace"))
        byte = f"0x{data[error.start]:02x}"
        raise ValueError(f"dataset={source!r} line {line}: byte {byte} is not {encoding}. {_SAVE_AS}") from error
    if "\0" in text:
        line = _line(text[: text.index("\0")])
        raise ValueError(f"dataset={source!r} line {line}: UTF-8 text has no NUL characters. {_SAVE_AS}")
    return text.replace("\ufeff", "")  # byte order marks; joined files also have them in the middle


def _line(before: str) -> int:
    return len(_LINE_END.findall(before)) + 1


def _csv(source: str, text: str, column: str) -> Dataset:
    text = text.lstrip("\r\n")
    first = _LINE_END.split(text, maxsplit=1)[:1]
    headers = {
        separator: [name.strip() for name in next(csv.reader(first, delimiter=separator))]
        for separator in (",", ";", "\t")
    }
    separator = next((s for s, header in headers.items() if column in header), ",")
    header = headers[separator]
    if header.count(column) > 1:
        raise ValueError(f"dataset={source!r} has more than one column {column!r}; rename all but one.")
    fix = "Put a text with commas or line ends in double quotes, and write a quote inside it twice."
    try:
        table = pandas.read_csv(io.StringIO(text), sep=separator)
    except ValueError as error:  # includes pandas' ParserError
        raise ValueError(f"dataset={source!r} could not be read as csv: {str(error).strip()}. {fix}") from error
    if not isinstance(table.index, pandas.RangeIndex):  # pandas took the first field for the row's name
        raise ValueError(f"dataset={source!r} could not be read as csv: rows have more fields than the header. {fix}")
    table.columns = [str(name).strip() for name in table.columns]
    columns = {name: [None if pandas.isna(value) else value for value in table[name].tolist()] for name in table}
    if column in header:  # as written: "null" or "7" may be a prompt
        texts = pandas.read_csv(
            io.StringIO(text), sep=separator, usecols=[header.index(column)], dtype=str, keep_default_na=False
        )
        columns[column] = texts.iloc[:, 0].tolist()
    return _table(source, column, columns)


def _json(source: str, text: str, column: str) -> Dataset:
    decoder, values, at = json.JSONDecoder(), [], _SPACE.match(text).end()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"dataset={source!r} could not be read as json: line {_line(text[: error.pos])}: "
                f"{error.msg}. A .jsonl file has one object per line, with strings in double quotes."
            ) from error
        values += value if isinstance(value, list) else [value]
        at = _SPACE.match(text, at).end()
    if len(values) == 1 and isinstance(values[0], dict) and isinstance(values[0].get(column), list):
        columns = values[0]  # an object of lists
        lengths = {name: len(own) if isinstance(own, list) else None for name, own in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"dataset={source!r}: its lists differ in length: {lengths}; give one value per row.")
    elif values and all(isinstance(value, str) for value in values):
        columns = {column: values}
    else:
        for row, value in enumerate(values):
            if not isinstance(value, dict):
                raise ValueError(
                    f"dataset={source!r} row {row} is {value!r}; every row must be an object such as "
                    f'{{"{column}": "a red circle"}}, or every row a string.'
                )
        columns = {name: [row.get(name) for row in values] for name in {name: None for row in values for name in row}}
    return _table(source, column, columns or {column: []})


def _table(source: str, column: str, columns: dict[str, list]) -> Dataset:
    """Return the columns as a dataset; every row of `column` must hold text."""
    for row, prompt in enumerate(columns.get(column, ())):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"dataset={source!r} row {row}: {column} is {prompt!r}; every row needs text. Add it, or remove "
                "the row."
            )
    for name, values in columns.items():
        try:
            Dataset.from_dict({name: values})
        except (ValueError, TypeError) as error:  # Arrow's errors are subclasses of these
            raise ValueError(
                f"dataset={source!r}: column {name!r} cannot be stored ({error}); give all its rows one "
                "type, or leave it out."
            ) from error
    return Dataset.from_dict(columns)
