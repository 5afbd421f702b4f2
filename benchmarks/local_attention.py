"""Measure what local attention over time would save on long videos, and what it costs in samples.

    python benchmarks/local_attention.py                 # Wan 2.1 1.3B, 81 x 480 x 832, random weights, one GPU
    python benchmarks/local_attention.py --fp8           # the same on an FP8 base
    python benchmarks/local_attention.py --samples       # tiny-wan's samples judged by the verifier, on a CPU
    python benchmarks/local_attention.py --tiny          # the first command's code path on a CPU

The latent frames are cut into groups of G, and a frame attends to its own group and the two adjacent ones (block-local
attention). Each group is one call of the usual attention kernel on a slice of keys and values, so there is no mask to
store and no other kernel; sampling and update compute the same, and `error` is max |log p(update) - log p(sampling)|.
`density` is the share of the products of all frames with all frames that is computed. Random weights say nothing about
samples, so --samples runs the trained tiny-wan (5 latent frames) with deterministic flow-Euler: mean scores +- 95 %,
and the difference from full attention for the same prompts and noise. This is a measurement, not a setting.
"""

import argparse
import contextlib
from collections.abc import Iterator

import numpy as np
import speed
import torch
from diffusers import WanPipeline
from diffusers.models.transformers import transformer_wan
from tiny_wan_scores import sample
from torch import Tensor

from pisces_rl.assets import asset_path
from pisces_rl.policy.fast import wan_block
from pisces_rl.shapemotion import load_prompts, verify

SAMPLERS = ((4, 1.0), (20, 3.0))  # steps, guidance


def key_ranges(frames: int, group: int) -> list[tuple[int, int, int, int]]:
    """Return (first and last query frame, first and last key frame) of each group, ends exclusive."""
    return [
        (first, min(first + group, frames), max(first - group, 0), min(first + 2 * group, frames))
        for first in range(0, frames, group)
    ]


def density(frames: int, group: int | None) -> float:
    if group is None:
        return 1.0
    return sum((b - a) * (d - c) for a, b, c, d in key_ranges(frames, group)) / frames**2


@contextlib.contextmanager
def local_attention(frames: int, group: int | None) -> Iterator[None]:
    """Make Wan's self attention local while the context is open; None: leave it."""
    attend = transformer_wan.dispatch_attention_fn

    def locally(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        if group is None or q.shape[1] != k.shape[1]:  # cross attention
            return attend(q, k, v, **options)
        tokens = q.shape[1] // frames
        parts = [
            attend(
                q[:, a * tokens : b * tokens], k[:, c * tokens : d * tokens], v[:, c * tokens : d * tokens], **options
            )
            for a, b, c, d in key_ranges(frames, group)
        ]
        return torch.cat(parts, 1)

    modules = transformer_wan, wan_block
    for module in modules:
        module.dispatch_attention_fn = locally
    try:
        yield
    finally:
        for module in modules:
            module.dispatch_attention_fn = attend


def compare_speed(args) -> None:
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    frames = (speed.size_of(args)["num_frames"] - 1) // 4 + 1
    print("| group | density | rollout ms | update ms | error | rollout GiB | update GiB |\n" + "|---" * 7 + "|")
    for group in args.groups:
        with local_attention(frames, group):
            policy = speed.build("fp8" if args.fp8 else "fused", args, device)
            cells = "{:.0f} | {:.0f} | {:.1e} | {:.2f} | {:.2f}".format(*speed.measure(policy, args, device)[:5])
        print(f"| {group or 'all frames'} | {density(frames, group):.2f} | {cells} |", flush=True)
        del policy
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def compare_samples(args) -> None:
    pipe = WanPipeline.from_pretrained(asset_path("tiny-wan"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scores = ("correct", "alignment", "quality")
    print("| split | steps, guidance | group | density | " + " | ".join(scores) + " |\n" + "|---" * 7 + "|")
    for split in args.splits:
        prompts = list(load_prompts(split, args.n, 0)["prompt"])
        for steps, guidance in SAMPLERS:
            full = None
            for group in (None, *filter(None, args.groups)):
                with local_attention(5, group):
                    judged = verify(sample(pipe, prompts, steps, guidance, 0, 32), prompts)
                found = {name: np.asarray(getattr(judged, name), dtype=float) for name in scores}
                full = full or found
                cells = []
                for name in scores:
                    change = found[name] - full[name]
                    half = 1.96 * change.std(ddof=1) / len(change) ** 0.5
                    cells.append(f"{found[name].mean():.3f} ({change.mean():+.3f} +- {half:.3f})")
                row = f"| {split} | {steps}, {guidance:g} | {group or 'all frames'} | {density(5, group):.2f} |"
                print(f"{row} {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speed.work_options(parser)
    parser.set_defaults(batch=1, micro_batch=1, steps=3)
    parser.add_argument("--groups", type=int, nargs="+", help="latent frames per group, 0: all; 0 4 3 2, or 0 2 1")
    parser.add_argument("--fp8", action="store_true", help="on an FP8 base")
    parser.add_argument("--samples", action="store_true", help="judge tiny-wan's samples instead of timing")
    parser.add_argument("--splits", nargs="+", default=["test_seen", "test_color_shape"])
    parser.add_argument("--n", type=int, default=256, help="prompts per split")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.profile = 0
    small = args.samples or args.tiny
    args.groups = [group or None for group in args.groups or ([0, 2, 1] if small else [0, 4, 3, 2])]
    if args.samples:
        return compare_samples(args)
    if not args.tiny:
        for name, value in dict(height=480, width=832, frames=81).items():
            setattr(args, name, getattr(args, name) or value)
    compare_speed(args)


if __name__ == "__main__":
    main()
