"""Make the table of docs/results/demo.md from finished runs of the quick start.

for s in 0 1 2; do make demo ARGS="--seed $s --output_dir outputs/seed_$s"; done
python benchmarks/quickstart_seeds.py outputs/seed_0 outputs/seed_1 outputs/seed_2
"""

import argparse
import json
from pathlib import Path

import numpy as np

from pisces_rl.trainers.base.run.report import paired_bootstrap

SCORES = ("judges/shapemotion_correct", "judges/shapemotion_alignment", "judges/shapemotion_quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs on the same evaluation sets")
    arguments = parser.parse_args()
    evaluations = []
    for run in arguments.runs:
        files = sorted((run / "evaluations").glob("step_*.json"))
        if len(files) < 2:
            parser.error(f"{run} has fewer than two evaluations")
        evaluations.append([json.loads(path.read_text(encoding="utf-8"))["sets"] for path in (files[0], files[-1])])
    print("| set | score | n | base | " + " | ".join(run.name for run in arguments.runs) + " | mean |")
    print("|---" * (5 + len(arguments.runs)) + "|")
    for name, first in evaluations[0][0].items():
        for score in SCORES:
            rows = [
                paired_bootstrap(before[name]["scores"][score], after[name]["scores"][score])
                for before, after in evaluations
            ]
            cells = [f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]" for r in rows]
            mean = np.mean([r["difference"] for r in rows])
            print(
                f"| {name} | {score.removeprefix('judges/shapemotion_')} | {len(first['prompts'])} | "
                f"{rows[0]['before']:.3f} | " + " | ".join(cells) + f" | {mean:+.3f} |"
            )


if __name__ == "__main__":
    main()
