"""Measure peak GPU memory and time of reward backpropagation on Wan 2.1 1.3B with random weights.

    python benchmarks/backprop_memory.py                 # the rows of docs/backprop.md, one GPU
    python benchmarks/backprop_memory.py --tiny          # the same code path on a CPU in seconds

One video, gradients through the last step, LoRA of rank 32, bf16, both kinds of activations recomputed in backward;
the rewards are `ot_quality` and `ot_semantic` on a model of InternVideo2's size, also with random weights (2.6 GiB of
the peak). The text encoder is small, with the right width. The peak is over two optimizer steps, including sampling
and rewards.
"""

import argparse
import tempfile
import time

import torch
from datasets import Dataset
from random_wan import random_wan
from real_check import PROMPTS
from reward_overhead import build

from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer
from pisces_rl.policy import default_lora_config
from pisces_rl.rewards import OTAttention, OTQualityReward, OTSemanticReward

STEPS = 2
#: frames, height, width, K, latent frames that are decoded with a graph (None: all)
ROWS = [
    (33, 240, 416, 1, 2),
    (33, 240, 416, 1, None),
    (33, 240, 416, 4, 2),
    (81, 480, 832, 1, 1),
    (81, 480, 832, 1, 2),
]
TINY_ROWS = [(9, 16, 16, 1, 2), (9, 16, 16, 4, None)]


def measure(row: tuple, tiny: bool, rewards: list) -> tuple[float, float]:
    """Return (GiB, seconds per step)."""
    frames, height, width, last_steps, decoded = row
    with tempfile.TemporaryDirectory() as folder:
        config = RewardBackpropConfig(
            output_dir=folder,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=1.0,
            backprop_steps=last_steps,
            decode_frames=decoded,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            max_steps=STEPS,
            gradient_checkpointing=True,
            bf16=not tiny,
            use_cpu=tiny,
            save_strategy="no",
            report_to="none",
            num_sample_videos=0,
        )
        dtype, device = (torch.float32, "cpu") if tiny else (torch.bfloat16, "cuda")
        trainer = RewardBackpropTrainer(
            model=random_wan(tiny, dtype, device),
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            peft_config=default_lora_config(32),
        )
        if not tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / STEPS
        norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
        assert len(norms) == STEPS and all(0 < float(norm) < float("inf") for norm in norms), norms
        return float("nan") if tiny else torch.cuda.max_memory_allocated() / 2**30, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run small models on a CPU")
    args = parser.parse_args()
    encoder = build("tiny-vtm", "cpu") if args.tiny else build("internvideo2", "cuda")
    rewards = [OTQualityReward(encoder), OTSemanticReward(encoder, OTAttention())]
    print("| video | K | latent frames decoded | peak GiB | seconds a step |\n|---|---|---|---|---|")
    for row in TINY_ROWS if args.tiny else ROWS:
        frames, height, width, last_steps, decoded = row
        try:
            peak, seconds = measure(row, args.tiny, rewards)
            cells = f"{peak:.1f} | {seconds:.1f}"
        except torch.cuda.OutOfMemoryError:
            cells = "out of memory |"
        print(f"| {frames} x {height} x {width} | {last_steps} | {decoded or 'all'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
