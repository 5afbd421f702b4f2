"""Compare learning on an FP8 base and on a bf16 base: GRPO on tiny-wan, with adapters evaluated on the bf16 base.

    python benchmarks/fp8_learning.py --output_dir outputs/fp8_learning            # five seeds each, on a GPU
    python benchmarks/fp8_learning.py --device cpu --seeds 0 1 --prompts 8 --max_steps 2 --use_cpu     # a trial

The runs are those of recipes/shapemotion_grpo.yaml (the verifier as reward) under bf16 autocast, seeds 0 to 4, which
differ only in `base_precision`. diffusers then loads each adapter into the bf16 model and samples it in 4 steps
without guidance and in 20 steps with guidance 3, on the same prompts and noise, scored by the verifier's `correct`.

The main comparison was fixed before any run: `correct` on held_out in 4 steps without guidance, FP8 minus bf16, paired
by seed, with the 95 % t-interval over seeds. For reference, the table shows the same for the untrained model sampled
in FP8 and in bf16, with the interval over prompts, which is the error of FP8 itself.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from best_recipe import SPLITS, scores, start
from scipy.stats import t as student

from pisces_rl.shapemotion import load_prompts
from pisces_rl.trainers.base.run.report import paired_bootstrap

PRECISIONS = {"bf16": [], "fp8": ["--base_precision", "fp8"]}


def interval(values: np.ndarray) -> str:
    """Return the mean +- half of the 95 % t-interval."""
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.3f} +- {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/fp8_learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=128, help="a split")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128, help="videos sampled at once")
    args, extra = parser.parse_known_args()  # the remaining arguments go to every run
    folders = {(name, seed): args.output_dir / f"{name}-{seed}" for name in PRECISIONS for seed in args.seeds}
    runs = {
        key: start("quick-start's", key[1], folder, ["--bf16", "true", *PRECISIONS[key[0]], *extra])
        for key, folder in folders.items()
    }
    for key, run in runs.items():
        if run.wait():
            raise SystemExit(f"{key} failed: see {folders[key] / 'log.txt'}")
    prompts = {
        name: [p for split in splits for p in load_prompts(split, args.prompts, seed=3)["prompt"]]
        for name, splits in SPLITS.items()
    }
    common = prompts, args.device, args.batch, torch.bfloat16
    untrained = {name: scores(None, *common, None if name == "bf16" else name) for name in PRECISIONS}
    found = {key: scores(folder, *common) for key, folder in folders.items()}
    print(
        "| sampled with / set | untrained, bf16 | untrained, FP8 minus bf16 | trained on bf16 | trained on FP8 | "
        "FP8 minus bf16 |\n" + "|---" * 6 + "|"
    )
    for label, before in untrained["bf16"].items():
        own = paired_bootstrap(before, untrained["fp8"][label])
        means = {name: np.array([found[name, seed][label].mean() for seed in args.seeds]) for name in PRECISIONS}
        by_seed = [f"{values.mean():.3f} ({', '.join(f'{v:.3f}' for v in values)})" for values in means.values()]
        print(
            f"| {label} | {before.mean():.3f} | {own['difference']:+.3f} [{own['low']:+.3f}, {own['high']:+.3f}] | "
            + " | ".join(by_seed)
            + f" | {interval(means['fp8'] - means['bf16'])} |"
        )


if __name__ == "__main__":
    main()
