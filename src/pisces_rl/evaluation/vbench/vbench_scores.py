"""Read result files of VBench's runner, and compare two sets of them."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .vbench_constants import Benchmark, benchmark_of

RESULTS = "*_eval_results.json"
_INDEX = re.compile(r"-\d+$")


@dataclass
class DimensionResult:
    """One dimension of one model.

    Attributes:
        score: the runner's mean.
        prompts: {prompt as in the file names: mean of its videos' results}, on the score's scale.
        file: the file it was read from.
    """

    score: float
    prompts: dict[str, float]
    file: Path


def read_results(path: str | os.PathLike) -> tuple[Benchmark, dict[str, DimensionResult]]:
    """Read the results of VBench's or VBench-2.0's runner; return the benchmark and {dimension: result}.

    Each file is {dimension: [mean, [{"video_path", "video_results"}, ...]]}. Videos that VBench-2.0 marks as invalid
    (-1) are excluded from all means. VBench's imaging quality has results from 0 to 100 and a mean from 0 to 1 (in
    version 0.1.0, to 100); all are scaled to 0 to 1.

    Args:
        path: a file, or a folder with `*_eval_results.json` at any depth.

    Raises:
        ValueError: there is no result file, one is unreadable or malformed, or two have the same dimension.
    """
    path = Path(path)
    files = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"results={str(path)!r} holds no {RESULTS}; give the output_path of `vbench evaluate`.")
    contents: dict[str, tuple[list, Path]] = {}
    for file in files:
        for dimension, content in _content(file).items():
            if dimension in contents:
                raise ValueError(
                    f"results={str(path)!r}: {dimension!r} is in {contents[dimension][1]} and in {file}; "
                    "remove the older one."
                )
            contents[dimension] = content, file
    benchmark = benchmark_of(contents, f"results={str(path)!r}")
    return benchmark, {d: _result(benchmark, d, *contents[d]) for d in benchmark.dimensions if d in contents}


def _content(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}. Run that dimension again.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} must hold {{dimension: [mean, results]}}; it is not a VBench result file.")
    return content


def _result(benchmark: Benchmark, dimension: str, content: list, file: Path) -> DimensionResult:
    form = '[mean, [{"video_path": ..., "video_results": a number}, ...]]'
    try:
        score, videos = float(content[0]), [(str(v["video_path"]), float(v["video_results"])) for v in content[1]]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{file}: {dimension!r} must be {form} ({type(error).__name__}: {error}).") from error
    if not math.isfinite(score):
        raise ValueError(f"{file}: the mean of {dimension!r} is {score}; run that dimension again.")
    scale = benchmark.scales.get(dimension, 1.0)
    score = score * scale if scale != 1 and score > 1 else score
    results: dict[str, list[float]] = {}
    for path, value in videos:
        if math.isfinite(value) and value != benchmark.invalid:
            name = PurePosixPath(path.replace("\\", "/")).name
            results.setdefault(_INDEX.sub("", name.rpartition(".")[0] or name), []).append(value * scale)
    return DimensionResult(score, {prompt: float(np.mean(values)) for prompt, values in results.items()}, file)


def compare_results(
    before: str | os.PathLike, after: str | os.PathLike, resamples: int = 5000, confidence: float = 0.95
) -> dict:
    """Compare two models' results on one benchmark.

    A dimension's row has the runner's two means and the difference over the prompts in both, with a bootstrap interval
    over prompts (`paired_bootstrap`). A group's score is the weighted mean of its dimensions' normalized scores,
    (score - min) / (max - min), and the total is the weighted mean of the groups, as in VBench's cal_final_score.py.
    If a dimension is missing, its group and the total are omitted; that script counts it as 0. The intervals of groups
    and totals resample each prompt with all its dimensions, among prompts with the same dimensions, so that prompts
    shared by several dimensions are not counted as independent.

    Args:
        before: results of the model before training, see `read_results`.
        after: results of the model after training.
        resamples: bootstrap resamples.
        confidence: of the intervals.

    Returns:
        {"benchmark", "dimensions": {dimension: row}, "totals": {"Quality" ...: row}, "left_out": {total: missing
        dimensions}}; a row is {"before", "after", "n", "difference", "low", "high"}, where the last three are over n
        paired prompts and None if there are none.

    Raises:
        ValueError: see `read_results`; or the two are from different benchmarks, or share no dimension.
    """
    from pisces_rl.trainers.base.run.report import paired_bootstrap

    (benchmark, first), (other, second) = read_results(before), read_results(after)
    if benchmark != other:
        raise ValueError(f"before={str(before)!r} is of {benchmark.name}, after={str(after)!r} of {other.name}.")
    both = [dimension for dimension in first if dimension in second]
    if not both:
        raise ValueError(f"before has {list(first)}, after has {list(second)}: no dimension is in both.")
    rows, differences = {}, {}
    for dimension in both:
        old, new = first[dimension], second[dimension]
        shared = [prompt for prompt in old.prompts if prompt in new.prompts]
        pairs = [[result.prompts[prompt] for prompt in shared] for result in (old, new)]
        paired = paired_bootstrap(*pairs, resamples=resamples, confidence=confidence)
        rows[dimension] = _row(old.score, new.score, paired)
        differences[dimension] = dict(zip(shared, np.subtract(pairs[1], pairs[0]).tolist()))
    totals, left_out = {}, {}
    for name, weights in benchmark.totals().items():
        lacking = [dimension for dimension in weights if dimension not in rows]
        if lacking:
            left_out[name] = lacking
            continue
        old, new = (
            sum(weight * benchmark.normalised(d, result[d].score) for d, weight in weights.items())
            for result in (first, second)
        )
        slopes = {
            d: weight * (benchmark.normalised(d, 1.0) - benchmark.normalised(d, 0.0)) for d, weight in weights.items()
        }
        totals[name] = _row(old, new, _weighted_bootstrap(slopes, differences, resamples, confidence))
    return {"benchmark": benchmark.name, "dimensions": rows, "totals": totals, "left_out": left_out}


def _row(before: float, after: float, paired: Mapping[str, float]) -> dict:
    own = {key: paired[key] if paired["n"] else None for key in ("difference", "low", "high")}
    return {"before": before, "after": after, "n": paired["n"]} | own


def _weighted_bootstrap(
    slopes: Mapping[str, float],
    differences: Mapping[str, Mapping[str, float]],
    resamples: int,
    confidence: float,
    seed: int = 0,
) -> dict:
    """Return sum_d slope_d mean_p difference_dp and its percentile interval over prompts p. Prompts are resampled
    within each set that has the same dimensions d, so the number of prompts per dimension is fixed."""
    if not all(differences[d] for d in slopes):
        return {"n": 0}
    parts: dict[str, float] = {}
    owners: dict[str, tuple[str, ...]] = {}
    for dimension, slope in slopes.items():
        for prompt, difference in differences[dimension].items():
            parts[prompt] = parts.get(prompt, 0.0) + slope * difference / len(differences[dimension])
            owners[prompt] = (*owners.get(prompt, ()), dimension)
    strata: dict[tuple[str, ...], list[float]] = {}
    for prompt, part in parts.items():
        strata.setdefault(owners[prompt], []).append(part)
    rng, sums = np.random.default_rng(seed), np.zeros(resamples)
    for values in map(np.array, strata.values()):
        sums += values[rng.integers(len(values), size=(resamples, len(values)))].sum(1)
    low, high = np.quantile(sums, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"n": len(parts), "difference": sum(parts.values()), "low": float(low), "high": float(high)}
