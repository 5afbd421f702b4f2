"""A prompt suite of VBench or VBench-2.0 as the videos that its runner looks for."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .vbench_constants import Benchmark, benchmark_of

VIDEOS = "videos"  # the runner takes its first entry's suffix for all: nothing else may lie in it
_LONGEST_NAME = 255  # bytes, of Linux' and macOS' file systems


@dataclass(frozen=True)
class SuiteVideo:
    """One video to sample: its prompt, the seed of its start noise, and the files that show it."""

    prompt: str
    seed: int
    paths: tuple[str, ...]


def read_suite(
    path: str | os.PathLike, dimensions: Sequence[str] | None = None, seed: int = 0
) -> tuple[Benchmark, list[SuiteVideo]]:
    """The videos of a suite, each prompt's one after the other.

    VBench: `videos/{prompt}-{index}.mp4`, 5 of each prompt, 25 where it is of temporal_flickering, whose static videos
    are picked out afterwards. VBench-2.0: `videos/{dimension}/{first 180 characters}-{index}.mp4`, 3 of each prompt,
    20 of those of Diversity. The seed is a hash of `seed`, prompt and index, so it depends on nothing else.

    Args:
        path: a JSON list of {"prompt_en", "dimension": [...], ...}, as VBench_full_info.json and
            VBench2_full_info.json are.
        dimensions: only prompts of these, with their samples; None: all of the suite.
        seed: of all noise.

    Raises:
        ValueError: the file is no such list, or is of neither benchmark; a dimension is not in it; a prompt cannot be
            in a file's name as the runner expects it, or two of VBench-2.0 would share one.
    """
    entries = _entries(Path(path))
    benchmark = benchmark_of((d for _, own in entries for d in own), f"suite={str(path)!r}")
    present = [d for d in benchmark.dimensions if any(d in own for _, own in entries)]
    missing = [d for d in dimensions or () if d not in present]
    if missing:
        raise ValueError(f"dimensions={missing} have no prompts in suite={str(path)!r}; it has {present}.")
    chosen = set(dimensions or present)
    paths: dict[tuple[str, int], list[str]] = {}
    prompt_of: dict[str, str] = {}
    for prompt, own in entries:
        own = [d for d in own if d in chosen]
        for dimension in own:
            folder = f"{VIDEOS}/{dimension}" if benchmark.by_dimension else VIDEOS
            for index in range(benchmark.more_samples.get(dimension, benchmark.samples)):
                file = f"{folder}/{_name(benchmark, prompt, index, path)}"
                if prompt_of.setdefault(file, prompt) != prompt:
                    raise ValueError(
                        f"suite={str(path)!r}: the prompts {prompt_of[file]!r} and {prompt!r} share "
                        f"the file name {file!r}; leave one out."
                    )
                files = paths.setdefault((prompt, index), [])
                if file not in files:
                    files.append(file)
    return benchmark, [
        SuiteVideo(prompt, _seed(seed, prompt, index), tuple(files)) for (prompt, index), files in paths.items()
    ]


def _entries(path: Path) -> list[tuple[str, list[str]]]:
    """(prompt, dimensions) of each entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"suite={str(path)!r} cannot be read as JSON: {error}. Give VBench_full_info.json of "
            "github.com/Vchitect/VBench."
        ) from error
    form = 'an object such as {"prompt_en": "a red apple", "dimension": ["color"]}'
    if not isinstance(content, list) or not content:
        raise ValueError(f"suite={str(path)!r} must hold a list, each of whose entries is {form}.")
    found = []
    for row, entry in enumerate(content):
        prompt, own = (entry.get("prompt_en"), entry.get("dimension")) if isinstance(entry, dict) else (None, None)
        if (
            not isinstance(prompt, str)
            or not prompt.strip()
            or not isinstance(own, list)
            or not own
            or not all(isinstance(d, str) for d in own)
        ):
            raise ValueError(f"suite={str(path)!r} entry {row} must be {form}; it is {entry!r}.")
        found.append((prompt, own))
    return found


def _name(benchmark: Benchmark, prompt: str, index: int, path: str | os.PathLike) -> str:
    name = f"{prompt[: benchmark.name_length]}-{index}.mp4"
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        length = None
    if "/" in name or "\0" in name or length is None or length > _LONGEST_NAME:
        raise ValueError(
            f"suite={str(path)!r}: {benchmark.name}'s runner looks for a file named {name!r}, which no file system "
            f"can hold (at most {_LONGEST_NAME} bytes, no '/' or NUL). Reword that prompt, or leave it out."
        )
    return name


def _seed(seed: int, prompt: str, index: int) -> int:
    content = json.dumps([seed, prompt, index]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
