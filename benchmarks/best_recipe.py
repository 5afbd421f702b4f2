"""Compare the quick start's recipe with Flow-GRPO's on tiny-wan: seconds per step and the scores of the policies.

    python benchmarks/best_recipe.py --output_dir outputs/best_recipe             # three seeds each, on a GPU

Both train on the verifier for the same number of steps and videos. Flow-GRPO's recipe samples 20 guided steps, trains
19 of them and has a KL term (benchmarks/recipes/flow_grpo_tiny_wan.yaml); the quick start's recipe samples 4 steps
without guidance and trains one (recipes/shapemotion_grpo.yaml). The first seed of each runs alone to measure its time,
the median step after the first three. Then the unmodified pipeline samples every policy deterministically, in 4 steps
without guidance and in 20 steps with guidance 3, on the same prompts and noise. The table has the verifier's `correct`
and its gain over the base, as means over seeds with 95 % bootstrap intervals over prompts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import WanPipeline
from tiny_wan_scores import sample

from pisces_rl.assets import asset_path
from pisces_rl.policy import VideoPolicy, load_lora
from pisces_rl.shapemotion import load_prompts, verify
from pisces_rl.trainers.base.run.report import paired_bootstrap
from pisces_rl.trainers.base.run.resume import last_checkpoint

ROOT = Path(__file__).parents[1]
RECIPES = {
    "Flow-GRPO's": "benchmarks/recipes/flow_grpo_tiny_wan.yaml",
    "quick-start's": "recipes/shapemotion_grpo.yaml",
}
SPLITS = {"test_seen": ("test_seen",), "held_out": ("test_color_shape", "test_shape_motion")}
SAMPLERS = {"4 steps, no guidance": (4, 1.0), "20 steps, guidance 3": (20, 3.0)}
PARTS = ("text", "rollout", "decode", "rewards", "update", "idle")


def start(recipe: str, seed: int, folder: Path, extra: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "examples" / "grpo_t2v.py"), "--config", str(ROOT / RECIPES[recipe])]
    command += [
        "--seed",
        str(seed),
        "--output_dir",
        str(folder),
        "--eval_prompts",
        "0",
        "--num_sample_videos",
        "0",
        "--save_strategy",
        "steps",
        "--save_total_limit",
        "1",
        "--report_to",
        "none",
        *extra,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def seconds_a_step(folder: Path) -> float:
    """Return the median after the first three steps, from the last checkpoint's log."""
    last = Path(last_checkpoint(folder))
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [sum(row.get(f"seconds/{part}", 0.0) for part in PARTS) for row in history if "seconds/update" in row]
    return median(steps[3:] or steps)


@torch.no_grad()
def scores(
    adapter: Path | None,
    prompts: dict[str, list[str]],
    device: str,
    batch: int,
    dtype: torch.dtype = torch.float32,
    base_precision: str | None = None,
) -> dict[str, np.ndarray]:
    """Return `correct` by sampler and set."""
    pipe = WanPipeline.from_pretrained(asset_path("tiny-wan"), dtype=dtype).to(device)
    pipe.transformer.requires_grad_(False)
    VideoPolicy(pipe).set_base_precision(base_precision)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        load_lora(pipe, adapter)
    found = {}
    for sampler, (steps, guidance) in SAMPLERS.items():
        for name, texts in prompts.items():
            videos = sample(pipe, texts, steps, guidance, 7, batch)
            found[f"{sampler} / {name}"] = np.asarray(verify(videos, texts).correct, dtype=float)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/best_recipe"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=128, help="a split")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="videos sampled at once")
    args, extra = parser.parse_known_args()  # the remaining arguments go to every run
    folders = {
        (recipe, seed): args.output_dir / f"{Path(path).stem}-{seed}"
        for recipe, path in RECIPES.items()
        for seed in args.seeds
    }
    first = {(recipe, args.seeds[0]): folders[recipe, args.seeds[0]] for recipe in RECIPES}
    for groups in ([[key] for key in first], [[key for key in folders if key not in first]]):
        for keys in groups:
            runs = {key: start(*key, folders[key], extra) for key in keys}
            for key, run in runs.items():
                if run.wait():
                    raise SystemExit(f"{key} failed: see {folders[key] / 'log.txt'}")
    times = {recipe: seconds_a_step(folder) for (recipe, _), folder in first.items()}
    for recipe, seconds in times.items():
        print(f"{recipe} recipe: {seconds:.2f} s a step")
    print(f"ratio {times[next(iter(RECIPES))] / times[list(RECIPES)[1]]:.1f}\n")
    prompts = {
        name: [p for split in splits for p in load_prompts(split, args.prompts, seed=3)["prompt"]]
        for name, splits in SPLITS.items()
    }
    base = scores(None, prompts, args.device, args.batch)
    found = {key: scores(folder, prompts, args.device, args.batch) for key, folder in folders.items()}
    print("| sampled with / set | base | " + " | ".join(f"{recipe} recipe" for recipe in RECIPES) + " | difference |")
    print("|---" * (3 + len(RECIPES)) + "|")
    for label, before in base.items():
        after = {recipe: np.mean([found[recipe, seed][label] for seed in args.seeds], 0) for recipe in RECIPES}
        gains = [paired_bootstrap(before, after[recipe]) for recipe in RECIPES]
        gap = paired_bootstrap(*after.values())
        cells = [f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]" for r in (*gains, gap)]
        print(f"| {label} | {before.mean():.3f} | " + " | ".join(cells) + " |")
        by_seed = {recipe: [f"{found[recipe, seed][label].mean():.3f}" for seed in args.seeds] for recipe in RECIPES}
        print("|   by seed | | " + " | ".join(", ".join(values) for values in by_seed.values()) + " | |")


if __name__ == "__main__":
    main()
