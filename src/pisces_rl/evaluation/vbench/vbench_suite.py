"""Read a prompt suite of VBench or VBench-2.0 as the list of videos that its runner expects."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .vbench_constants import Benchmark, benchmark_of

VIDEOS = "videos"  # the runner applies the first entry's suffix to all: keep other files out
_LONGEST_NAME = 255  # bytes, on Linux and macOS file systems


@dataclass(frozen=True)
class SuiteVideo:
    """One video to sample: its prompt, the seed of its start noise, and the files that show it."""

    prompt: str
    seed: int
    paths: tuple[str, ...]


def read_suite(
    path: str | os.PathLike, dimensions: Sequence[str] | None = None, seed: int = 0
) -> tuple[Benchmark, list[SuiteVideo]]:
    """Return the benchmark and the videos of a suite, grouped by prompt.

    VBench: `videos/{prompt}-{index}.mp4`, 5 per prompt, or 25 for temporal_flickering, whose static videos are
    selected later. VBench-2.0: `videos/{dimension}/{first 180 characters}-{index}.mp4`, 3 per prompt, or 20 for
    Diversity. A video's seed is a hash of `seed`, prompt and index only.

    Args:
        path: a JSON list of {"prompt_en", "dimension": [...], ...}, such as VBench_full_info.json or
            VBench2_full_info.json.
        dimensions: keep only prompts of these dimensions; None: all.
        seed: seed of all noise.

    Raises:
        ValueError: the file is not such a list or fits neither benchmark; it lacks a dimension; a file system cannot
            hold a prompt's file name, or two prompts of VBench-2.0 would share one.
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
                        f"the file name {file!r}; remove one."
                    )
                files = paths.setdefault((prompt, index), [])
                if file not in files:
                    files.append(file)
    return benchmark, [
        SuiteVideo(prompt, _seed(seed, prompt, index), tuple(files)) for (prompt, index), files in paths.items()
    ]


def _entries(path: Path) -> list[tuple[str, list[str]]]:
    """Return (prompt, dimensions) of each entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"suite={str(path)!r} cannot be read as JSON: {error}. Give VBench_full_info.json from "
            "github.com/Vchitect/VBench."
        ) from error
    form = 'an object such as {"prompt_en": "a red apple", "dimension": ["color"]}'
    if not isinstance(content, list) or not content:
        raise ValueError(f"suite={str(path)!r} must hold a list whose entries are each {form}.")
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
            f"suite={str(path)!r}: {benchmark.name}'s runner expects a file named {name!r}, which no file system "
            f"can hold (at most {_LONGEST_NAME} bytes, no '/' or NUL). Reword or remove that prompt."
        )
    return name


def _seed(seed: int, prompt: str, index: int) -> int:
    content = json.dumps([seed, prompt, index]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
