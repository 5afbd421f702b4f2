"""Make the tables of docs/results/demo.md and rewards.md from finished runs of the quick start.

for s in 0 1 2; do make demo ARGS="--seed $s --output_dir outputs/seed_$s"; done
python benchmarks/quickstart_seeds.py outputs/seed_0 outputs/seed_1 outputs/seed_2
python benchmarks/quickstart_seeds.py outputs/this_? --against outputs/other_?

--against also prints the gains of the first runs minus those of the others, paired in the given order, +- half of
the width of the 95 % t-interval over the pairs.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from fp8_learning import interval

from pisces_rl.trainers.base.run.report import paired_bootstrap

SCORES = ("judges/shapemotion_correct", "judges/shapemotion_alignment", "judges/shapemotion_quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs on the same evaluation sets")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="as many runs, in the same order of seeds")
    arguments = parser.parse_args()
    if arguments.against and len(arguments.against) != len(arguments.runs):
        parser.error(f"--against has {len(arguments.against)} folders for {len(arguments.runs)} runs")
    for run in (*arguments.runs, *arguments.against):
        if len(evaluations(run)) < 2:
            parser.error(f"{run} has fewer than two evaluations")
    for run, other in zip(arguments.runs, arguments.against):
        if prompts(run) != prompts(other):
            parser.error(f"{run} and {other} were evaluated on other prompts")
    print("| set | score | n | base | " + " | ".join(run.name for run in arguments.runs) + " | mean |")
    print("|---" * (5 + len(arguments.runs)) + "|")
    gained, others = ({run: gains(run) for run in runs} for runs in (arguments.runs, arguments.against))
    for (name, score), first in gained[arguments.runs[0]].items():
        rows = [gain[name, score] for gain in gained.values()]
        cells = [f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" for row in rows]
        mean = np.mean([row["difference"] for row in rows])
        print(
            f"| {name} | {score} | {first['n']} | {first['before']:.3f} | " + " | ".join(cells) + f" | {mean:+.3f} |"
        )
    if not others:
        return
    print("\n| set | score | difference |\n|---|---|---|")
    for key in gained[arguments.runs[0]]:
        pairs = zip(gained.values(), others.values(), strict=True)
        values = np.array([ours[key]["difference"] - theirs[key]["difference"] for ours, theirs in pairs])
        print(f"| {key[0]} | {key[1]} | {interval(values)} |")


def evaluations(run: Path) -> list[Path]:
    return sorted((run / "evaluations").glob("step_*.json"))


def prompts(run: Path) -> dict[str, list[str]]:
    """Return the prompts of each evaluation set."""
    first = json.loads(evaluations(run)[0].read_text(encoding="utf-8"))
    return {name: one["prompts"] for name, one in first["sets"].items()}


def gains(run: Path) -> dict[tuple[str, str], dict]:
    """Return {(set, score): its last evaluation minus its first, from `paired_bootstrap`}."""
    before, *_, after = (json.loads(path.read_text(encoding="utf-8"))["sets"] for path in evaluations(run))
    return {
        (name, score.removeprefix("judges/shapemotion_")): paired_bootstrap(
            one["scores"][score], after[name]["scores"][score]
        )
        for name, one in before.items()
        for score in SCORES
    }


if __name__ == "__main__":
    main()
