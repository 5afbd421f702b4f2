"""Measure seconds per step and peak GPU memory of every method on Wan 2.1 1.3B with random weights, 8 videos per step.

    python benchmarks/method_speed.py                       # the table of docs/methods.md, one GPU
    python benchmarks/method_speed.py --tiny                # the same code path on a CPU in a minute
    python benchmarks/method_speed.py --methods grpo nft

Each method runs recipes/wan21_1.3b_METHOD.yaml in a separate process, but samples 16 steps as GRPO does, so that only
training differs: GRPO trains a window of two steps, the forward-process methods four noise levels, and each keeps its
reference policies. Flow-DPPO uses each rollout twice. `backprop` is reward backpropagation through the last step, one
video at a time, on `temporal_smoothness`, with two latent frames decoded. Times are seconds per optimizer step by
part, means of the steps after the first two.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
import yaml
from datasets import Dataset
from random_wan import random_wan
from real_check import PROMPTS

from pisces_rl import METHODS, RewardBackpropConfig, RewardBackpropTrainer
from pisces_rl.policy import default_lora_config
from pisces_rl.rewards import load_reward

RECIPES = Path(__file__).parents[1] / "recipes"
PARTS = ("text", "rollout", "sampling", "decode", "rewards", "update", "idle")
VIDEOS = 8
OWN = {"model", "dataset", "rewards", "eval_prompts", "method", "lora_r", "lora_alpha"}  # the script's
BACKPROP = {"per_device_train_batch_size": 1, "decode_frames": 2, "learning_rate": 1e-4}


def settings_of(method: str) -> tuple[dict, int]:
    """Return the trainer settings of the method's recipe, and the rank of its adapter."""
    recipe = yaml.safe_load((RECIPES / f"wan21_1.3b_{method}.yaml").read_text(encoding="utf-8"))
    return {name: value for name, value in recipe.items() if name not in OWN}, recipe["lora_r"]


def measure(method: str, steps: int, tiny: bool) -> dict[str, float]:
    """Return seconds by part, their sum, and peak GiB."""
    backprop = method == "backprop"
    settings, rank = settings_of("grpo" if backprop else method)
    if backprop:
        make_trainer, make_config = RewardBackpropTrainer, RewardBackpropConfig
        known = make_config.__dataclass_fields__
        settings = {name: value for name, value in settings.items() if name in known} | BACKPROP
    else:
        make_trainer, make_config = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        settings |= {
            "output_dir": folder,
            "max_steps": steps,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": not tiny,
            "use_cpu": tiny,
            "num_sample_videos": 0,
            "num_inference_steps": 16,
            "logging_steps": 1,
            "gradient_accumulation_steps": VIDEOS // settings["per_device_train_batch_size"],
        }
        if tiny:
            settings |= {
                "height": 16,
                "width": 16,
                "num_frames": 9,
                "torch_compile": False,
                "gradient_checkpointing": False,
                "attention_kernel": "math",
            }
        prompts = [f"{prompt}, take {take}" for take in range(VIDEOS) for prompt in PROMPTS]
        dtype, device = (torch.float32, "cpu") if tiny else (torch.bfloat16, "cuda")
        trainer = make_trainer(
            random_wan(tiny, dtype, device),
            [load_reward(name) for name in ["temporal_smoothness"]],
            make_config(**settings),
            Dataset.from_dict({"prompt": prompts}),
            peft_config=default_lora_config(rank),
        )
        if not tiny:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    rows = [row for row in trainer.state.log_history if "step_time" in row][2:]
    found = {part: fmean(row.get(f"seconds/{part}", 0.0) for row in rows) for part in PARTS}
    found["step"] = sum(found.values())
    found["rollout"] += found.pop("sampling")  # backpropagation's name for it
    found["GiB"] = float("nan") if tiny else torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    names = [*METHODS, "backprop"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=6, help="steps to run; the first two are not counted")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to try the code")
    args = parser.parse_args()
    print("| method | step | rollout | decode | rewards | update | idle | peak GiB |\n|" + "---|" * 8, flush=True)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for method in args.methods:
            try:
                found = pool.submit(measure, method, args.steps, args.tiny).result()
            except Exception as error:  # continue with the other methods
                print(f"{method} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            columns = [f"{found[name]:.2f}" for name in ("step", "rollout", "decode", "rewards", "update", "idle")]
            print(f"| {method} | " + " | ".join(columns) + f" | {found['GiB']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
