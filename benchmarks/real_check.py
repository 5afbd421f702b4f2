"""Run a few GRPO steps of Wan 2.1's recipe; print replay error, time and peak memory by stage, and adapter reload.

    python benchmarks/real_check.py                    # weights from the Hub, one GPU
    python benchmarks/real_check.py --random_weights   # the same sizes with random weights, no Hub
    python benchmarks/real_check.py --tiny             # the same code path on a CPU in seconds

Other options override the recipe's settings. 81 frames of 480 x 832 in 24 GB, and the 14B model on one 80 GB GPU:

    python benchmarks/real_check.py --random_weights --text_encoder full --offload text_encoder vae rewards \\
        --short --height 480 --width 832 --num_frames 81 --recompute everything --memory_limit 23
    python benchmarks/real_check.py --random_weights --text_encoder full --offload text_encoder vae rewards \\
        --short --model wan21_14b --recompute everything

Random weights keep the denoiser and the VAE at full size; without `--text_encoder full` the 5.7 B text encoder is
replaced by a small one of the same output width (4,096). The tokenizer's tokens are bytes.
"""

import argparse
import contextlib
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from random_wan import TEXT_ENCODERS, random_wan
from speed import profiled

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.policy import default_lora_config
from pisces_rl.rewards import motion_amount, temporal_smoothness
from pisces_rl.trainers.base.config import OFFLOAD

RECIPE = Path(__file__).parents[1] / "recipes" / "wan21_1.3b_grpo.yaml"
SCRIPT_KEYS = ("model", "dataset", "rewards", "eval_prompts", "lora_r")
HUB = {"wan21_1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan21_14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
PROMPTS = [
    "a cat walks over wet grass",
    "waves break on a rocky beach",
    "a paper plane crosses a classroom",
    "steam rises from a cup of tea",
]
REPLACES = {  # settings of the recipe
    "height": int,
    "width": int,
    "num_frames": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "num_generations": int,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "rollout_batch_size": int,
    "recompute": str,
    "base_precision": str,
    "vae_chunk_frames": int,
}
SHORT = dict(
    num_inference_steps=4,
    guidance_scale=5.0,
    num_generations=2,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    rollout_batch_size=1,
)


class Stages:
    """Seconds and the device's peak memory by stage; an inner stage is not counted in its outer one.

    profile(name) returns a context to enter with a stage.
    """

    def __init__(self, cuda: bool, profile: Callable[[str], contextlib.AbstractContextManager]):
        self.profile = profile
        self.cuda, self.now, self.since = cuda, "building", time.perf_counter()
        self.seconds, self.peaks, self.reserved = defaultdict(float), defaultdict(int), 0

    def _close(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.peaks[self.now] = max(self.peaks[self.now], torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[self.now] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def __call__(self, name: str):
        self._close()
        before, self.now = self.now, name
        try:
            yield
        finally:
            self._close()
            self.now = before

    def around(self, name: str | None, manager):
        """Wrap a function that returns a context in a stage; None names the stage by the function's argument."""

        @contextlib.contextmanager
        def both(*args):
            stage = name or args[0]
            with self(stage), self.profile(stage), manager(*args):
                yield

        return both

    def watch(self, trainer: VideoGRPOTrainer) -> None:
        """Time the trainer's stages and, within its rollouts, text encoding and decoding."""
        trainer.stage = self.around(None, trainer.stage)
        memo, vae = trainer.policy.prompt_memo, trainer.pipeline.vae
        memo.during = self.around("text", memo.during)
        decode = vae.decode

        @functools.wraps(decode)
        def decode_watched(*args, **kwargs):
            with self("decode"):
                return decode(*args, **kwargs)

        vae.decode = decode_watched

    def table(self, steps: int) -> str:
        """Return a table with seconds per step; building and the check run once."""
        order = ["building", "text", "rollout", "decode", "rewards", "update", "other", "adapter check"]
        rows = [f"{'stage':<16}{'seconds':>9}{'peak GiB':>10}"]
        for name in order:
            peak = f"{self.peaks[name] / 2**30:.2f}" if self.cuda else "no GPU"
            share = 1 if name in ("building", "adapter check") else steps
            rows.append(f"{name:<16}{self.seconds[name] / share:>9.2f}{peak:>10}")
        if self.cuda:
            rows.append(f"{'reserved':<16}{'':>9}{self.reserved / 2**30:>10.2f}")
        return "\n".join(rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random_weights", action="store_true", help="full size, random weights, no Hub")
    parser.add_argument("--tiny", action="store_true", help="a few hundred parameters, for a CPU")
    parser.add_argument("--model", choices=list(HUB), default="wan21_1.3b")
    parser.add_argument("--text_encoder", choices=list(TEXT_ENCODERS), default="small", help="of random weights")
    parser.add_argument(
        "--offload", nargs="*", choices=OFFLOAD, default=None, help="the recipe setting of the same name"
    )
    parser.add_argument("--short", action="store_true", help=f"use settings for a short run: {SHORT}")
    parser.add_argument(
        "--memory_limit", type=float, default=None, help="GiB that torch may allocate; more is an error"
    )
    parser.add_argument("--tiling", action="store_true", help="decode tile by tile")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="a YAML file of settings")
    parser.add_argument("--max_steps", type=int, default=2, help="optimizer steps")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="ROWS", help="print the kernels of the last rollout and update"
    )
    parser.add_argument("--output_dir", default=None, help="folder to keep; default: a temporary folder")
    for name, kind in REPLACES.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help="instead of the recipe's")
    parser.add_argument("--vae_compile", action="store_true", help="compile the decoder's chunks")
    parser.add_argument("--vae_cudnn_benchmark", action="store_true", help="let cuDNN time the decoder's kernels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("no GPU was found; --tiny runs the same code on a CPU")
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict:
    """Return the recipe's settings with their overrides."""
    recipe = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    settings = {key: value for key, value in recipe.items() if key not in SCRIPT_KEYS}
    settings |= dict(max_steps=arguments.max_steps, save_strategy="no", report_to="none", offload=arguments.offload)
    settings["num_sample_videos"] = 0
    settings["replay_tolerance"] = 1.0  # print the difference instead of failing
    if arguments.tiny:
        settings |= dict(
            height=16,
            width=16,
            num_frames=9,
            num_inference_steps=10,
            use_cpu=True,
            learning_rate=1e-3,
            torch_compile_backend="aot_eager",
        )
    settings |= SHORT if arguments.short else {}
    settings["vae_tiling"] = arguments.tiling
    settings |= {name: getattr(arguments, name) for name in ("vae_compile", "vae_cudnn_benchmark")}
    settings |= {name: getattr(arguments, name) for name in REPLACES if getattr(arguments, name) is not None}
    low, high = settings["sde_window_range"]
    settings["sde_window_range"] = [low, min(high, settings["num_inference_steps"] - 1)]
    return settings | {"lora_r": recipe["lora_r"]}


def main() -> None:
    arguments = parsed()
    cuda = torch.cuda.is_available() and not arguments.tiny
    settings = settings_of(arguments)
    rank = settings.pop("lora_r")
    if arguments.memory_limit is not None and cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory_limit * 2**30 / total))

    def profile(name: str) -> contextlib.AbstractContextManager:
        last = trainer.state.global_step == config.max_steps - 1
        if not (arguments.profile and last and name in ("rollout", "update")):
            return contextlib.nullcontext()
        return profiled(name, "cuda" if cuda else "cpu", arguments.profile)

    stages = Stages(cuda, profile)
    with tempfile.TemporaryDirectory() as temporary:
        config = VideoGRPOConfig(**settings | {"output_dir": arguments.output_dir or temporary})
        model = HUB[arguments.model]
        if arguments.random_weights or arguments.tiny:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            model = random_wan(
                arguments.tiny,
                dtype,
                "cuda" if cuda else "cpu",
                model=arguments.model,
                text_encoder=arguments.text_encoder,
                vae_dtype=dtype,
            )
        trainer = VideoGRPOTrainer(
            model=model,
            reward_funcs=[temporal_smoothness, motion_amount],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            peft_config=default_lora_config(rank),
        )
        stages.watch(trainer)
        start = time.perf_counter()
        with stages("other"):
            trainer.train()
        seconds = time.perf_counter() - start
        with stages("adapter check"):
            trainer.save_model()  # raises if the reloaded adapter gives other latents
        logs = [row for row in trainer.state.log_history if "replay/max_log_prob_error" in row]
        frozen = sum(p.numel() for p in trainer.policy.denoiser.parameters() if not p.requires_grad)
        print(f"denoiser             {frozen / 1e9:.2f} B parameters; offload {config.offload or 'nothing'}")
        size = f"{config.num_frames} x {config.height} x {config.width}"
        print(
            f"videos per step      {config.generation_batch_size} of {size}, {config.num_inference_steps} denoising "
            f"steps, {config.sde_window_size} trained, guidance {config.guidance_scale}"
        )
        print(
            f"replay parity        max |log p(update) - log p(sampling)| = "
            f"{max(row['replay/max_log_prob_error'] for row in logs):.2e}"
        )
        print(f"seconds per step     {seconds / len(logs):.1f}")
        print(
            "seconds of the last  "
            + ", ".join(
                f"{key} {logs[-1][f'seconds/{key}']:.2f}"
                for key in ("text", "rollout", "decode", "rewards", "update", "idle")
                if f"seconds/{key}" in logs[-1]
            )
        )
        print(stages.table(len(logs)))
        if cuda:
            print(f"peak memory          {max(stages.peaks.values()) / 2**30:.1f} GiB")
        print("adapter reload       equal")


if __name__ == "__main__":
    main()
