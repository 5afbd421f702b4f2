"""Print the study's tables and plot its curves from the records of run.py.

    python benchmarks/study/table.py                                # outputs/study/records
    python benchmarks/study/table.py --stage A --figure outputs/study/curves.png
    python benchmarks/study/table.py RECORDS --cells backprop_both grpo_both --against grpo_none

Values are means over seeds +- half of the 95 % t-interval; differences are paired by seed. `untrained`: evaluated
before the first step. `KL`: from the untrained sampler, per latent dimension (run.py). `guided`: `correct` on held_out
in 20 steps with guidance 3. `stopped by ...`: the evaluation at which that score was highest on test_seen, and the
value of `correct` on held_out at that evaluation.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from recipes import STAGES, cells
from scipy.stats import t as student

SCORES = {
    "correct": "judges/shapemotion_correct",
    "alignment": "judges/shapemotion_alignment",
    "quality": "judges/shapemotion_quality",
    "judge cosine": "judges/judge_cosine",
    "judge matching": "judges/judge_matching",
}
SETS = ("test_seen", "held_out")


def read(folder: Path) -> dict[str, dict[int, dict]]:
    """{cell: {seed: record}}."""
    records = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        records[record["cell"]][record["seed"]] = record
    return records


def score(record: dict, part: str, name: str, at: int = -1) -> float:
    values = [v for v in record["evaluations"][at]["sets"][part]["scores"][SCORES.get(name, name)] if v is not None]
    return float(np.mean(values))


def divergences(record: dict) -> list[float]:
    """KL at each evaluation."""
    return [record["kl"][str(e["step"])] for e in record["evaluations"]]


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} +- {half:.3f}"


def row(values: list) -> None:
    print("| " + " | ".join(map(str, values)) + " |")


def table(records: dict) -> None:
    for part in SETS:
        print(f"\n{part}, after training\n")
        row(["cell", "seeds", *SCORES, "distance", "Vendi", "KL", "guided", "seconds of training"])
        row(["---"] * (len(SCORES) + 7))
        first = next(iter(next(iter(records.values())).values()))
        row(["untrained", "", *(f"{score(first, part, name, 0):.3f}" for name in SCORES), "", "", "", "", ""])
        for cell, runs in records.items():
            runs = [runs[seed] for seed in sorted(runs)]
            scores = [spread([score(run, part, name) for run in runs]) for name in SCORES]
            diverse = [spread([run["diversity"][key] for run in runs]) for key in ("distance", "vendi")]
            seconds = spread([sum(step["step_time"] for step in run["steps"]) for run in runs])
            guided = spread([run["guided"]["correct"] for run in runs if "guided" in run and part == "held_out"])
            row([cell, len(runs), *scores, *diverse, spread([divergences(run)[-1] for run in runs]), guided, seconds])


def differences(records: dict, against: str, base: dict[int, dict]) -> None:
    for part in SETS:
        print(f"\n{part}, minus {against}, paired by seed\n")
        row(["cell", "seeds", *SCORES])
        row(["---"] * (len(SCORES) + 2))
        for cell, runs in records.items():
            seeds = sorted(set(runs) & set(base))
            if cell == against or not seeds:
                continue
            gaps = [[score(runs[s], part, name) - score(base[s], part, name) for s in seeds] for name in SCORES]
            row([cell, len(seeds), *map(spread, gaps)])


def stopping(records: dict) -> None:
    """Is the end the best moment, and does a judge that is never trained on find a better one?"""
    print("\nwhen to stop: correct on held_out\n")
    names = ("judge matching", "judge cosine", "reward", "correct")
    row(["cell", "seeds", "at the end", *(f"stopped by {name}" for name in names)])
    row(["---"] * (len(names) + 3))
    for cell, runs in records.items():
        runs = [runs[seed] for seed in sorted(runs)]
        if len(runs[0]["evaluations"]) < 3 or not runs[0]["settings"]["rewards"]:
            continue
        values = [spread([score(run, "held_out", "correct") for run in runs])]
        for name in names:
            seen = [[score(run, "test_seen", name, i) for i in range(len(run["evaluations"]))] for run in runs]
            values.append(spread([score(run, "held_out", "correct", int(np.argmax(s))) for run, s in zip(runs, seen)]))
        row([cell, len(runs), *values])


def figure(records: dict, path: Path) -> None:
    """The verifier's judgement over training, over the reward that is trained on, and over the KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), sharey=True)
    for cell, runs in records.items():
        runs = list(runs.values())
        count = min(len(run["evaluations"]) for run in runs)
        if count < 3 or not runs[0]["settings"]["rewards"]:
            continue

        def mean(name: str, runs=runs, count=count) -> np.ndarray:
            return np.array([np.mean([score(run, "held_out", name, i) for run in runs]) for i in range(count)])

        steps = np.array([e["step"] for e in runs[0]["evaluations"][:count]])
        reward = mean("reward")
        kl = np.mean([divergences(run)[:count] for run in runs], 0)
        for axis, x in zip(axes, (steps / max(steps[-1], 1), reward - reward[0], kl)):
            axis.plot(x, mean("correct"), marker=".", label=cell)
    for axis, label in zip(axes, ("share of the run", "gain of the trained reward", "KL from the untrained sampler")):
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="correct, held-out compositions")
    axes[0].legend(fontsize=7)
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=Path("outputs/study/records"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cells", nargs="+", choices=cells(), metavar="CELL", help="these, of those recorded")
    which.add_argument("--stage", choices=STAGES, help="the cells of this stage")
    parser.add_argument("--against", default="grpo_none", choices=cells(), metavar="CELL", help="compared with this")
    parser.add_argument("--figure", type=Path, help="write the curves there (needs matplotlib)")
    args = parser.parse_args(arguments)
    recorded = read(args.records)
    wanted = args.cells or cells(args.stage or "")
    records = {cell: runs for cell, runs in recorded.items() if cell in wanted}
    if not records:
        parser.error(f"{args.records} holds no records of {', '.join(wanted)}; run benchmarks/study/run.py first.")
    table(records)
    if args.against in recorded:
        differences(records, args.against, recorded[args.against])
    stopping(records)
    if args.figure:
        figure(records, args.figure)


if __name__ == "__main__":
    main()
