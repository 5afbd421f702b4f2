"""Rewards in files: file.py:function as people write such files and paths.

Such cases come from issue trackers of whatever loads plug-ins by path: dataclasses whose module is nowhere, files of
one name in two folders, files that import their neighbours.
"""

import pickle
import sys
import traceback

import pytest

from pisces_rl.rewards import load_reward

SCORE = "def score(prompts, videos):\n    return [{}] * len(prompts)\n"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """sys.path and sys.modules after each test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "pytest" in sys.modules[name].__file__:
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_dataclass_under_postponed_annotations(tmp_path):
    """dataclasses looks its module up in sys.modules, where it was not: AttributeError, 'NoneType' has no __dict__."""
    path = write(
        tmp_path / "my-rewards.v2.py",
        """
from __future__ import annotations
import dataclasses
from typing import ClassVar

@dataclasses.dataclass
class Weights:
    names: ClassVar[list[str]] = []
    sharp: float = 1.5

def score(prompts, videos):
    return [Weights().sharp] * len(prompts)

def weights(prompts):
    return Weights()
""",
    )
    assert load_reward(f"{path}:score")(["a"], None) == [1.5]
    made = load_reward(f"{path}:weights")([])
    assert pickle.loads(pickle.dumps(made)) == made
    assert pickle.loads(pickle.dumps(load_reward(f"{path}:score"))) is load_reward(f"{path}:score")


def test_two_files_of_one_stem(tmp_path):
    """a/rewards.py and b/rewards.py, each its own module; one file is one module for all its functions."""
    for number, folder in enumerate("ab"):
        write(tmp_path / folder / "rewards.py", SCORE.format(number) + "seen = []\ndef other(prompts): return seen\n")
    first, second = (load_reward(f"{tmp_path}/{folder}/rewards.py:score") for folder in "ab")
    assert first([1], None) == [0] and second([1], None) == [1] and first.__module__ != second.__module__
    assert load_reward(f"{tmp_path}/a/rewards.py:other").__globals__ is first.__globals__


def test_a_file_that_was_changed_is_loaded_again(tmp_path, monkeypatch):
    """In a notebook, after a fix; within a second, for which bytecode of the same size would count as current."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for value in (1, 2):
        path = write(tmp_path / "rewards.py", SCORE.format(value))
        assert load_reward(f"{path}:score")([0], None) == [value]


def test_a_file_that_imports_its_neighbour(tmp_path):
    """As it can when it is run as a script; also later, inside the function."""
    write(tmp_path / "neighbour_one.py", "VALUE = 3\n")
    write(tmp_path / "neighbour_two.py", "VALUE = 4\n")
    path = write(
        tmp_path / "rewards.py",
        "import neighbour_one\ndef score(prompts):\n    import neighbour_two\n"
        "    return [neighbour_one.VALUE + neighbour_two.VALUE]\n",
    )
    assert load_reward(f"{path}:score")([0]) == [7]


def test_a_neighbour_that_is_another_folders(tmp_path):
    """Both folders have a helpers_of_mine.py: the second file would have been given the first one's."""
    for number, folder in enumerate("ab"):
        write(tmp_path / folder / "helpers_of_mine.py", f"VALUE = {number}\n")
        write(tmp_path / folder / "rewards.py", "from helpers_of_mine import VALUE\ndef score(p): return [VALUE]\n")
    assert load_reward(f"{tmp_path}/a/rewards.py:score")([0]) == [0]
    with pytest.raises(ValueError, match="imports 'helpers_of_mine', which is next to it as .*, but Python"):
        load_reward(f"{tmp_path}/b/rewards.py:score")


def linked(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def test_a_file_of_the_hubs_cache(tmp_path):
    """A snapshot's files link to blobs without a suffix: 'NoneType' object has no attribute 'loader'."""
    text = SCORE.format(1) + "import beside_in_cache\ndef other(prompts): return beside_in_cache.VALUE\n"
    linked(tmp_path / "snapshot/beside_in_cache.py", write(tmp_path / "blobs/def", "VALUE = 2\n"))
    path = linked(tmp_path / "snapshot/rewards.py", write(tmp_path / "blobs/abc", text))
    assert load_reward(f"{path}:score")([0], None) == [1] and load_reward(f"{path}:other")([]) == 2


def test_a_link_to_a_file_with_neighbours(tmp_path):
    """home/rewards.py links to a project's file, which imports its neighbours there, one of them a link."""
    write(tmp_path / "project/beside_in_project.py", "VALUE = 3\n")
    linked(tmp_path / "project/linked_in_project.py", write(tmp_path / "elsewhere/other.py", "VALUE = 4\n"))
    text = (
        "import beside_in_project, linked_in_project\n"
        "def score(prompts): return [beside_in_project.VALUE + linked_in_project.VALUE]\n"
    )
    file = write(tmp_path / "project/rewards.py", text)
    assert load_reward(f"{file}:score")([0]) == [7]
    assert load_reward(f"{linked(tmp_path / 'home/rewards.py', file)}:score")([0]) == [7]


def test_a_file_that_raises_shows_where(tmp_path):
    """The traceback names file and line; the next attempt loads it again."""
    path = write(tmp_path / "rewards.py", "x = 1\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            load_reward(f"{path}:score")
        assert (str(path), 2) in [(f.filename, f.lineno) for f in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(SyntaxError) as caught:
        load_reward(f"{write(path, 'def (')}:score")
    assert caught.value.filename == str(path)
    assert load_reward(f"{write(path, SCORE.format(1))}:score")([0], None) == [1]


@pytest.mark.parametrize(
    "ending, message",
    [
        (":scores", "has no function 'scores'; did you mean 'score'[?] Available: made, score."),
        ("", "name a function, .*rewards.py:FUNCTION. Available: made, score."),
        (":", "name a function, .*rewards.py:FUNCTION. Available: made, score."),
        (":_hidden_", "has no function '_hidden_'. Available: made, score."),
        (":VALUE", "has no function 'VALUE'. Available: made, score."),
    ],
)
def test_a_missing_function_lists_those_there_are(tmp_path, ending, message):
    """Only functions of the file itself: no imports, no classes, no names with a leading underscore."""
    path = write(
        tmp_path / "rewards.py",
        "import functools\nfrom math import sqrt\nVALUE = 3\nclass Kind: pass\n"
        "def _hidden(): pass\n" + SCORE.format(1) + "made = functools.partial(score, videos=None)\n",
    )
    with pytest.raises(ValueError, match=message):
        load_reward(f"{path}{ending}")


def test_paths_with_colons_and_spaces(tmp_path, monkeypatch):
    """The last colon divides, so that a drive's letter or a time in a folder's name is the path's."""
    path = write(tmp_path / "run 12:30" / "C:rewards.py", SCORE.format(5))
    assert load_reward(f"{path}:score")([0], None) == [5]
    monkeypatch.chdir(path.parent)
    assert load_reward("C:rewards.py:score")([0], None) == [5]
    with pytest.raises(ValueError, match="name a function, C:rewards.py:FUNCTION"):
        load_reward("C:rewards.py")
    for missing in (r"C:\users\me\rewards.py:score", "~/no such folder/rewards.py:score"):
        with pytest.raises(ValueError, match="no file "):
            load_reward(missing)
    with pytest.raises(ValueError, match="is unknown"):
        load_reward("./rewards:score")
