"""The study's tables and curves from what run.py recorded.

    python benchmarks/study/table.py                                # outputs/study/records
    python benchmarks/study/table.py RECORDS --against grpo_none --figure outputs/study/curves.png

Mean over seeds +- half of the 95 % t-interval; differences are paired by seed. `untrained`: evaluated before the first
step.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t as student

SCORES = {
    "correct": "judges/shapemotion_correct", "alignment": "judges/shapemotion_alignment",
    "quality": "judges/shapemotion_quality", "judge cosine": "judges/judge_cosine",
    "judge matching": "judges/judge_matching",
}  # fmt: skip
SETS = ("test_seen", "held_out")


def read(folder: Path) -> dict[str, dict[int, dict]]:
    """{cell: {seed: record}}."""
    records = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        records[record["cell"]][record["seed"]] = record
    return records


def score(record: dict, part: str, name: str, at: int = -1) -> float:
    values = [v for v in record["evaluations"][at]["sets"][part]["scores"][SCORES.get(name, name)] if v is not None]
    return float(np.mean(values))


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} +- {half:.3f}"


def row(cells: list) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def table(records: dict) -> None:
    for part in SETS:
        print(f"\n{part}, after training\n")
        row(["cell", "seeds", *SCORES, "distance", "Vendi", "seconds of training"])
        row(["---"] * (len(SCORES) + 5))
        first = next(iter(next(iter(records.values())).values()))
        row(["untrained", "", *(f"{score(first, part, name, 0):.3f}" for name in SCORES), "", "", ""])
        for cell, runs in records.items():
            runs = [runs[seed] for seed in sorted(runs)]
            scores = [spread([score(run, part, name) for run in runs]) for name in SCORES]
            diverse = [spread([run["diversity"][key] for run in runs]) for key in ("distance", "vendi")]
            seconds = spread([sum(step["step_time"] for step in run["steps"]) for run in runs])
            row([cell, len(runs), *scores, *diverse, seconds])


def differences(records: dict, against: str) -> None:
    for part in SETS:
        print(f"\n{part}, minus {against}, paired by seed\n")
        row(["cell", "seeds", *SCORES])
        row(["---"] * (len(SCORES) + 2))
        for cell, runs in records.items():
            seeds = sorted(set(runs) & set(records[against]))
            if cell == against or not seeds:
                continue
            gaps = [
                spread([score(runs[s], part, name) - score(records[against][s], part, name) for s in seeds])
                for name in SCORES
            ]
            row([cell, len(seeds), *gaps])


def figure(records: dict, path: Path) -> None:
    """The verifier's judgement over training, and against the reward that is trained on: over-optimisation bends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (over_steps, over_reward) = pyplot.subplots(1, 2, figsize=(11, 4))
    for cell, runs in records.items():
        count = min(len(run["evaluations"]) for run in runs.values())
        if count < 2:
            continue
        steps = [e["step"] for e in next(iter(runs.values()))["evaluations"][:count]]
        judged = [np.mean([score(run, "held_out", "correct", i) for run in runs.values()]) for i in range(count)]
        reward = [np.mean([score(run, "held_out", "reward", i) for run in runs.values()]) for i in range(count)]
        over_steps.plot(np.array(steps) / max(steps[-1], 1), judged, label=cell)
        over_reward.plot(reward, judged, marker=".", label=cell)
    over_steps.set(xlabel="share of the run", ylabel="correct, held-out compositions")
    over_reward.set(xlabel="reward, held-out compositions")
    over_steps.legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=Path("outputs/study/records"))
    parser.add_argument("--against", default="grpo_none", help="cell that the others are compared with")
    parser.add_argument("--figure", type=Path, help="write the curves there (needs matplotlib)")
    args = parser.parse_args()
    records = read(args.records)
    if not records:
        parser.error(f"{args.records} holds no records; run benchmarks/study/run.py first.")
    table(records)
    if args.against in records:
        differences(records, args.against)
    if args.figure:
        figure(records, args.figure)


if __name__ == "__main__":
    main()
