"""Files of prompts as Excel, PowerShell, old Macs and scripts write them: each is read right, or the error names the
file, the line or row, and the fix.

The cases come from the issue trackers of datasets and pandas, and from what spreadsheets save.
"""

import json

import pytest

from pisces_rl.cli import load_prompt_dataset

TEXT = "a caf\u00e9\nzwei gr\u00fcne K\u00e4tzchen\n"
TABLE = "prompt,n\na caf\u00e9,1\nzwei,2\n"


def read(folder, name, content, **options):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_prompt_dataset(str(folder / name), **options)


def refused(folder, name, content, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        read(folder, name, content, **options)
    assert name in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are(tmp_path, encoding):
    """Notepad's mark was in the first prompt; PowerShell's `>` writes UTF-16."""
    assert read(tmp_path, "a.txt", TEXT.encode(encoding))["prompt"][:] == TEXT.split("\n")[:2]
    table = read(tmp_path, "a.csv", TABLE.encode(encoding))
    assert table["prompt"][:] == ["a caf\u00e9", "zwei"] and table["n"][:] == [1, 2]
    rows = read(tmp_path, "a.jsonl", '{"prompt": "\u00e9"}\n{"prompt": "b"}'.encode(encoding))
    assert rows["prompt"][:] == ["\u00e9", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("cp1252", r"line 3: byte 0xe9 is not UTF-8\. Save the file as UTF-8.*iconv"),
        ("utf-16-le", r"line \d: .*UTF-16LE"),
    ],
)
def test_encodings_that_must_be_guessed(tmp_path, name, encoding, message):
    """Excel's CSV of a German PC: a UnicodeDecodeError without the file's name."""
    refused(tmp_path, name, "prompt\nabc\n\u00e9\n".encode(encoding), message)


def test_nul_characters(tmp_path):
    """A binary file with the suffix of a text."""
    refused(tmp_path, "a.txt", b"ok\na\0b\n", "line 2: UTF-8 text has no NUL characters")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, end):
    """Windows, and a Mac of long ago."""
    assert read(tmp_path, "a.txt", f"a{end}{end}  b  {end}a{end}")["prompt"][:] == ["a", "b", "a"]  # twice is twice
    assert read(tmp_path, "a.csv", f"prompt,n{end}a,1{end}b,2{end}")["prompt"][:] == ["a", "b"]
    assert read(tmp_path, "a.jsonl", f'{{"prompt": "a"}}{end}{end}{{"prompt": "b"}}{end}')["prompt"][:] == ["a", "b"]


def test_separators_that_end_no_line(tmp_path):
    """A prompt from a web page holds U+2028: it was cut in two."""
    assert read(tmp_path, "a.txt", "a\u2028b\nc\x85d\x0be\n")["prompt"][:] == ["a\u2028b", "c\x85d\x0be"]


def test_two_marked_files_that_were_joined(tmp_path):
    """`cat a.txt b.txt` leaves a mark in the middle."""
    assert read(tmp_path, "a.txt", "a\n".encode("utf-8-sig") + "b\n".encode("utf-8-sig"))["prompt"][:] == ["a", "b"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_of_a_csv(tmp_path, separator):
    """Excel of half of Europe writes semicolons."""
    text = separator.join(["n", " caption"]) + "\n" + separator.join(["1", '"a, b; c\nd ""e"""']) + "\n"
    table = read(tmp_path, "a.csv", text, column="caption")
    assert table["prompt"][:] == ['a, b; c\nd "e"'] and table["n"][:] == [1]


def test_prompts_of_a_csv_are_texts(tmp_path):
    """The prompts "null", "NA" and "1999" were lost or numbers; other columns keep their types."""
    table = read(tmp_path, "a.csv", "prompt,n,s\nnull,1,x\nNA,,\n1999,3,y\n")
    assert table["prompt"][:] == ["null", "NA", "1999"]
    assert table["n"][:] == [1, None, 3] and table["s"][:] == ["x", None, "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt\na cat, running\n", "more fields than the header. Put a text with commas.*in double quotes"),
        ("prompt,n\na cat, running,1\n", "more fields than the header"),
        ("prompt,n\na,1\na cat, running,2\n", "line 3.*double quotes"),
        ('prompt,n\n"a,1\nb,2\n', "EOF inside string.*double quotes"),
        ("prompt,n\na,1\n,2\n", "row 1: prompt is ''; every row needs text"),
        ("prompt,prompt\na,b\n", "more than one column 'prompt'"),
        ("Prompt,n\na,1\n", r"has columns \['Prompt', 'n'\] but none named 'prompt'.*--dataset_column"),
        ("text;n\na;1\n", "none named 'prompt'.*--dataset_column"),
        (" \n\n", "holds no prompt"),
    ],
)
def test_broken_csv(tmp_path, content, message):
    """A comma without quotes made " running" the prompt, without a word."""
    refused(tmp_path, "a.csv", content, message)


def test_a_renamed_column_meets_another(tmp_path):
    """`--dataset_column caption` on a table that has a column `prompt`, too."""
    refused(tmp_path, "a.csv", "prompt,caption\na,b\n", "a column 'prompt' beside 'caption'", column="caption")


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": ["a", "b"], "n": [1, 2]}',
        '[{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]',
        '{"prompt": "a", "n": 1}\n\n{"prompt": "b", "n": 2}',
        '{\n "prompt": "a", "n": 1\n}\n{"prompt": "b", "n": 2}',
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_forms_of_json(tmp_path, name, content):
    """Objects in lines, in a list, printed over lines, and an object of lists."""
    table = read(tmp_path, name, content)
    assert table["prompt"][:] == ["a", "b"] and table["n"][:] == [1, 2]


def test_json_of_strings_and_rows_that_lack_a_column(tmp_path):
    """The shortest file of prompts; and columns that only later rows have."""
    assert read(tmp_path, "a.json", '["a", "b"]')["prompt"][:] == ["a", "b"]
    assert read(tmp_path, "b.json", '["a"]', column="caption")["prompt"][:] == ["a"]
    assert read(tmp_path, "a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "n": 1}')["n"][:] == [None, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}', "line 3: Expecting"),
        ("{'prompt': 'a'}", "line 1: .*double quotes"),
        ('{"prompt": "a"}\n{"n": 1}', "row 1: prompt is None; every row needs text"),
        ('{"prompt": "a"}\n{"prompt": 3}', "row 1: prompt is 3"),
        ('{"prompt": " "}', "row 0: prompt is ' '"),
        ('{"prompt": "a"}\n"b"', "row 1 is 'b'; every row must be an object"),
        ('{"prompt": ["a", "b"], "n": [1]}', "differ in length"),
        ('{"prompt": ["a"], "n": 1}', "differ in length"),
        ('{"data": [{"prompt": "a"}]}', r"has columns \['data'\] but none named"),
        ("[]", "holds no prompt"),
        ('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}', "column 'n' cannot be stored"),
        ('{"prompt": "\\ud83d"}', "column 'prompt' cannot be stored"),
    ],
)
def test_broken_json(tmp_path, content, message):
    """Each says where."""
    refused(tmp_path, "a.json", content, message)


def test_a_large_file(tmp_path):
    """20,000 lines are read in a moment, the last one, too."""
    rows = [{"prompt": f"clip {i}", "n": i} for i in range(20_000)]
    assert read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))[-1] == rows[-1]
