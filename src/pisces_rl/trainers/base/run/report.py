"""Compare evaluations before and after training: paired differences with intervals, as tables."""

import io
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ....markdown import escape


def paired_bootstrap(before, after, resamples: int = 5000, confidence: float = 0.95, seed: int = 0) -> dict:
    """Return the mean difference of paired samples with a percentile bootstrap interval.

    Args:
        before: n values, row i from the same prompt and noise as row i of `after`. Pairs with a None or NaN are
            ignored.
        after: n values.
        resamples: number of bootstrap resamples of the pairs.
        confidence: confidence level of the interval.
        seed: seed of the resampling.

    Returns:
        {"n", "before", "after", "difference", "low", "high"}; NaN if no pair is left.
    """
    before, after = np.array(before, dtype=float), np.array(after, dtype=float)
    kept = ~(np.isnan(before) | np.isnan(after))
    before, after = before[kept], after[kept]
    if not len(before):
        nan = float("nan")
        return {"n": 0, "before": nan, "after": nan, "difference": nan, "low": nan, "high": nan}
    difference = after - before
    rows = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    means = difference[rows].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "n": int(len(before)),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
    }


def compare(before: dict, after: dict) -> dict[str, dict[str, dict]]:
    """Compare two evaluations pair by pair: {dataset: {score: paired_bootstrap(...)}}.

    Args:
        before: {dataset: {"prompts": [...], "scores": {name: values}}}, as the trainer writes it.
        after: the same of the later evaluation.

    Raises:
        ValueError: the two have different prompts.
    """
    result = {}
    for name, first in before.items():
        second = after[name]
        if first["prompts"] != second["prompts"]:
            raise ValueError(f"evaluations of {name!r} have different prompts; paired differences need the same.")
        result[name] = {
            score: paired_bootstrap(values, second["scores"][score])
            for score, values in first["scores"].items()
            if score in second["scores"]
        }
    return result


def print_comparison(comparison: dict[str, dict[str, dict]], title: str, console: Console | None = None) -> None:
    """Print a table: score, n, before, after, difference with its interval, coloured if the interval excludes 0."""
    console = console or run_console()
    for name, scores in comparison.items():
        table = Table(
            title=Text(f"{title}: {name}"),
            title_justify="left",
            caption_justify="left",
            caption="difference: mean over paired prompts and noise, 95 % bootstrap interval",
        )
        for column in ("score", "n", "before", "after", "difference"):
            table.add_column(column, justify="left" if column == "score" else "right", no_wrap=True)
        for score, row in scores.items():
            if not row["n"]:
                continue
            colour = "green" if row["low"] > 0 else "red" if row["high"] < 0 else "default"
            difference = Text(f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]", style=colour)
            table.add_row(Text(score), str(row["n"]), f"{row['before']:.3f}", f"{row['after']:.3f}", difference)
        console.print(table)


def markdown_comparison(comparison: dict[str, dict[str, dict]]) -> str:
    """Return the same table as Markdown."""
    lines = ["| dataset | score | n | before | after | difference (95 %) |", "|---|---|---|---|---|---|"]
    for name, scores in comparison.items():
        lines += [
            f"| {escape(name)} | {escape(score)} | {r['n']} | {r['before']:.3f} | {r['after']:.3f} | "
            f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}] |"
            for score, r in scores.items()
            if r["n"]
        ]
    return "\n".join(lines) + "\n"


def read_evaluation(path: str | Path) -> dict:
    """Read an evaluation that the trainer wrote, {dataset: {"prompts", "scores"}}."""
    return json.loads(Path(path).read_text(encoding="utf-8"))["sets"]


def run_console() -> Console:
    """Return a console without markup, because user names may look like markup; 120 columns without a terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: an unencodable character must not end a run
    plain = {"markup": False, "emoji": False}
    console = Console(**plain)
    return console if console.is_terminal else Console(width=120, **plain)
