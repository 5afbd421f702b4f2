"""Time rollout and update in ms per sample and denoising step: Wan 2.1 1.3B at full size with random weights.

    python benchmarks/speed.py                               # the rows of table A, on a GPU
    python benchmarks/speed.py --variants compiled fused     # some of them
    python benchmarks/speed.py --tiny                        # the same code on a CPU in seconds

The work of table A in docs/results/speed.md: 33 frames of 240 x 416, batch 8, 512 text tokens, guidance on (two
forward passes per step), LoRA of rank 32 on to_q, to_k, to_v, to_out.0 with B not zero, flow_sde. Both phases are
timed as the trainer runs them, through the pipeline: rollout is `policy.sample` without decoding, update is
`policy.replay` with a backward at each step, in micro-batches. Two warm-up runs, median of --repeats; each run ends in
a synchronisation. `error` is max |log p(update) - log p(sampling)| of the first update.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import median

import torch
from diffusers import WanPipeline
from random_wan import random_wan

from pisces_rl.policy import VideoPolicy, add_lora, default_lora_config, lora_parameters
from pisces_rl.policy.fast.execution import compile_blocks
from pisces_rl.policy.fast.products import fuse_products

ATTENTION = r"blocks\..*(to_q|to_k|to_v|to_out\.0)"
SIZE = dict(height=240, width=416, frames=33)
TINY_SIZE = dict(height=16, width=16, frames=9)
VARIANTS = {  # name: (compiled, what is recomputed, attention kernel, fused products, base's precision)
    "eager": (False, None, None, False, None),
    "compiled": (True, "everything", None, False, None),
    "cudnn": (True, "everything", "cudnn", False, None),
    "keep": (True, "all_but_attention", "cudnn", False, None),
    "fused": (True, "all_but_attention", "cudnn", True, None),
    "fp8": (True, "all_but_attention", "cudnn", True, "fp8"),
}


def adapted_wan(args, dtype: torch.dtype, device: str, targets: str | None = ATTENTION) -> WanPipeline:
    """Build Wan with random weights and an adapter whose B is not zero; `targets` None: the recipes' modules."""
    pipe = random_wan(args.tiny, dtype, device).to(device)
    pipe.vae.requires_grad_(False)
    denoisers = {"transformer": pipe.transformer}
    add_lora(denoisers, default_lora_config(4 if args.tiny else 32, target_modules=targets))
    torch.manual_seed(1)
    for key, parameter in lora_parameters(denoisers).items():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    return pipe


def work_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the timed work."""
    parser.add_argument("--tiny", action="store_true", help="a few hundred parameters, for a CPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=4, help="samples per micro-batch of the update")
    parser.add_argument("--steps", type=int, default=4)
    for name, full in SIZE.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"{full}; {TINY_SIZE[name]} of --tiny")


def size_of(args) -> dict[str, int]:
    """Return height, width and num_frames of the pipeline's call."""
    known = TINY_SIZE if args.tiny else SIZE
    size = {name: getattr(args, name) or default for name, default in known.items()}
    return dict(height=size["height"], width=size["width"], num_frames=size["frames"])


def build(
    name: str,
    args,
    device: str,
    recompute: str | None = None,
    offload: Sequence[str] = (),
    targets: str | None = ATTENTION,
) -> VideoPolicy:
    """Build a variant's policy; `recompute` overrides the variant's, `offload` goes to `VideoPolicy.place`, `targets`
    to `adapted_wan`."""
    compiled, variants_recompute, kernel, fused, precision = VARIANTS[name]
    pipe = adapted_wan(args, torch.bfloat16 if device == "cuda" else torch.float32, device, targets)
    policy = VideoPolicy(
        pipe,
        transition="flow_sde",
        num_inference_steps=args.steps,
        pipeline_kwargs=dict(guidance_scale=5.0, max_sequence_length=512, **size_of(args)),
        autocast_dtype=torch.bfloat16 if device == "cuda" else None,
        attention_kernel=kernel,
    )
    policy.set_base_precision(precision)
    if offload:
        policy.place(device, offload)
    if fused:
        fuse_products(pipe.transformer)
    if compiled:
        compile_blocks(
            pipe.transformer,
            recompute=recompute or variants_recompute,
            backend="aot_eager" if args.tiny else "inductor",
        )
    else:
        policy.activation_checkpointing_enable()
    return policy


def once(call: Callable[[], None], device: str) -> tuple[float, float]:
    """Return seconds of a call and the peak of allocated GiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")


def timed(call: Callable[[], None], repeats: int, device: str, warm_up: int = 2) -> tuple[float, float]:
    """Return median seconds after the warm-up runs and the peak of allocated GiB."""
    runs = [once(call, device) for _ in range(warm_up + repeats)]
    return median(seconds for seconds, _ in runs[warm_up:]), runs[-1][1]


def phases(policy: VideoPolicy, args) -> tuple[Callable[[], None], Callable[[], None], list[torch.Tensor]]:
    """Return a rollout, its update, and |log p(update) - log p(sampling)| of every step updated so far."""
    prompts = [f"prompt {i}" for i in range(args.batch)]
    seeds, trained = list(range(args.batch)), list(range(args.steps - 1))
    found, errors = {}, []

    def roll() -> None:
        found["rollout"] = policy.sample(
            prompts, noise_seeds=seeds, step_seeds=seeds, steps=trained, output_type="latent"
        )

    def update() -> None:
        rollout = found["rollout"]
        for first in range(0, args.batch, args.micro_batch):
            rows = list(range(first, min(first + args.micro_batch, args.batch)))

            def visit(step, rows=rows) -> None:
                old = rollout.log_probs[rows, rollout.steps.index(step.index)]
                errors.append((step.log_prob.detach() - old).abs().max())
                step.log_prob.mean().backward()

            policy.replay(rollout, rows, visit, wait=False)
        policy.check_replays()

    return roll, update, errors


def measure(policy: VideoPolicy, args, device: str) -> tuple[float, ...]:
    """Return rollout ms, update ms, error, rollout GiB, update GiB, and seconds until the first of both finished."""
    roll, update, errors = phases(policy, args)
    start = time.perf_counter()
    roll()
    update()
    error = float(torch.stack(errors).max())
    first = time.perf_counter() - start
    rollout_seconds, rollout_peak = timed(roll, args.repeats, device)
    update_seconds, update_peak = timed(update, args.repeats, device)
    if args.profile:
        for label, call in (("rollout", roll), ("update", update)):
            with profiled(label, device, args.profile):
                call()
    per = 1000 / args.batch
    return (
        per * rollout_seconds / args.steps,
        per * update_seconds / (args.steps - 1),
        error,
        rollout_peak,
        update_peak,
        first,
    )


@contextlib.contextmanager
def profiled(label: str, device: str, shown: int) -> Iterator[None]:
    """Print the kernels that take the most time while the context is open, and the device's idle gaps."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        start = time.perf_counter()
        yield
        if device == "cuda":
            torch.cuda.synchronize()
        wall = 1000 * (time.perf_counter() - start)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1000
    print(f"{label}: {wall:.0f} ms, of which kernels {busy:.0f} ms")
    for row in rows[:shown]:
        print(f"  {row.self_device_time_total / 1000:8.1f} ms  {row.count:6d}  {row.key[:100]}")
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in profile.events() if e.device_type == kind)
    gaps = sorted(((after[0] - before[1]) / 1000, before[2], after[2]) for before, after in pairwise(events))
    inner = [gap for gap, *_ in gaps if gap > 0]
    short = sum(gap for gap in inner if gap < 0.02)
    print(f"  between them {sum(inner):.0f} ms idle, {short:.0f} of it below 20 us each")
    for gap, before, after in reversed(gaps[-shown // 3 :]):
        print(f"  {gap:8.2f} ms between {before[:45]} and {after[:45]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    work_options(parser)
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=18,
        default=0,
        metavar="ROWS",
        help="print the kernels of one rollout and one update",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--lora",
        default="attention",
        choices=["attention", "recipe"],
        help="attention: to_q, to_k, to_v, to_out.0; recipe: the feed-forward layers, too, as in the recipes",
    )
    args = parser.parse_args()
    targets = ATTENTION if args.lora == "attention" else None
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    print("| variant | rollout ms | update ms | error | rollout GiB | update GiB | s to begin |")
    print("|---|---|---|---|---|---|---|")
    for name in args.variants:
        policy = build(name, args, device, targets=targets)
        cells = "{:.1f} | {:.1f} | {:.1e} | {:.2f} | {:.2f} | {:.0f}".format(*measure(policy, args, device))
        print(f"| {name} | {cells} |", flush=True)
        del policy
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
