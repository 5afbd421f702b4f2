"""Time Flow-GRPO's code for Wan against this package, interleaved in one process, with the same work.

    git clone https://github.com/yifan123/flow_grpo
    python benchmarks/side_by_side.py flow_grpo                 # table A of docs/results/speed.md, on a GPU
    python benchmarks/side_by_side.py flow_grpo --tiny          # the same code path on a CPU

CHECKOUT's files run unmodified; none of its code is copied here. Rollout is `wan_pipeline_with_logprob` from
flow_grpo/diffusers_patch/wan_pipeline_with_logprob.py. Update is `compute_log_prob` from scripts/train_wan2_1.py (the
transformer with and without the prompt, then `sde_step_with_logprob`) and backward, for each trained step. That
script imports wandb, rewards and more, so only `compute_log_prob` is compiled from it, with the names of the former
file. As in that script, the scheduler is UniPC and accelerate's mixed precision wraps the transformer. All sides share
the weights, adapter and work of benchmarks/speed.py, gradient checkpointing, micro-batches, no decoding, the mean
log-prob as the loss, and one untrained step (the last). Flow-GRPO's text is encoded before its clock starts; this
package's is cached in the warm-up runs. `allow_tf32` keeps torch's default, since products under autocast are bf16.

Each side first runs twice unmeasured; then every round runs a rollout and an update of each side in turn, and the
table has medians over rounds. `error` is max |log p(update) - log p(sampling)| of the first update. GiB are a side's
peaks with only its own weights, gradients and rollout. The functions of November 2025 run with diffusers 0.42
unchanged.
"""

import argparse
import ast
import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FunctionType, SimpleNamespace

import diffusers
import speed
import torch
from accelerate import Accelerator
from diffusers import UniPCMultistepScheduler

SAMPLING = Path("flow_grpo/diffusers_patch/wan_pipeline_with_logprob.py")
TRAINING = Path("scripts/train_wan2_1.py")
SIDES = {
    "Flow-GRPO, fp32 base under autocast": torch.float32,
    "Flow-GRPO, bf16 base under autocast": torch.bfloat16,
    "pisces_rl, fused": None,
}
GUIDANCE = 5.0
Phases = tuple[Callable[[], None], Callable[[], None], list[torch.Tensor]]


def flow_grpo(checkout: Path) -> tuple[FunctionType, FunctionType]:
    """Return the checkout's `wan_pipeline_with_logprob` and `compute_log_prob`.

    Raises:
        ValueError: the checkout lacks a file or a function, or the pipeline's file imports a missing package.
    """
    for file in (SAMPLING, TRAINING):
        if not (checkout / file).is_file():
            raise ValueError(
                f"CHECKOUT={str(checkout)!r} has no file {file}: give a clone of github.com/yifan123/flow_grpo."
            )
    sys.path.insert(0, str(checkout.resolve()))
    try:
        module = importlib.import_module(".".join(SAMPLING.with_suffix("").parts))
    except ImportError as error:
        raise ValueError(f"{SAMPLING} cannot be imported: {error}.") from error
    for name in ("wan_pipeline_with_logprob", "sde_step_with_logprob"):
        if not hasattr(module, name):
            raise ValueError(f"{SAMPLING} has no function {name}; it was there in November 2025.")
    tree = ast.parse((checkout / TRAINING).read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "compute_log_prob"]
    if not wanted:
        raise ValueError(f"{TRAINING} has no function compute_log_prob; it was there in November 2025.")
    names = dict(vars(module))
    exec(compile(ast.Module(wanted, []), str(TRAINING), "exec"), names)
    return module.wan_pipeline_with_logprob, names["compute_log_prob"]


def theirs(functions: tuple[FunctionType, FunctionType], dtype: torch.dtype, args, device: str) -> Phases:
    """Return `speed.phases` for Flow-GRPO, with its base in the given dtype."""
    sample, compute_log_prob = functions
    pipe = speed.adapted_wan(args, dtype, device)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_gradient_checkpointing()
    transformer = Accelerator(mixed_precision="bf16", cpu=device == "cpu").prepare(pipe.transformer)
    with torch.no_grad():
        texts = [f"prompt {i}" for i in range(args.batch)]
        embeds, negative = pipe.encode_prompt(texts, [""] * args.batch, max_sequence_length=512, device=device)
    config = SimpleNamespace(train=SimpleNamespace(cfg=True), sample=SimpleNamespace(guidance_scale=GUIDANCE))
    found, errors = {}, []

    @torch.no_grad()
    def roll() -> None:
        transformer.eval()
        _, latents, log_probs, *_ = sample(
            pipe,
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            num_inference_steps=args.steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
            return_dict=False,
            **speed.size_of(args),
        )
        latents = torch.stack(latents, dim=1)
        found.update(
            latents=latents[:, :-1],
            next_latents=latents[:, 1:],
            log_probs=torch.stack(log_probs, dim=1),
            timesteps=pipe.scheduler.timesteps.repeat(args.batch, 1),
        )

    def update() -> None:
        transformer.train()
        for first in range(0, args.batch, args.micro_batch):
            rows = slice(first, first + args.micro_batch)
            part = {key: value[rows] for key, value in found.items()}
            for step in range(args.steps - 1):
                log_prob = compute_log_prob(transformer, pipe, part, step, embeds[rows], negative[rows], config)[1]
                errors.append((log_prob.detach() - part["log_probs"][:, step]).abs().max())
                log_prob.mean().backward()

    return roll, update, errors


def warmed_up(sides: dict[str, Callable[[], Phases]], device: str) -> tuple[dict[str, Phases], dict[str, list[float]]]:
    """Build each side and run it twice; return its error and its peak GiB, without the sides built before."""
    built, found = {}, {}
    for name, build in sides.items():
        gc.collect()
        before = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0
        roll, update, errors = built[name] = build()
        roll()
        update()
        error = float(torch.stack(errors).max())
        found[name] = [error, *(speed.once(call, device)[1] - before for call in (roll, update))]
        print(f"{name}: warmed up", file=sys.stderr, flush=True)
    return built, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="CHECKOUT", type=Path, help="a clone of github.com/yifan123/flow_grpo")
    parser.add_argument("--rounds", type=int, default=5)
    speed.work_options(parser)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    try:
        functions = flow_grpo(args.checkout)
    except ValueError as error:
        parser.error(str(error))
    sides = {
        name: (lambda dtype=dtype: theirs(functions, dtype, args, device))
        if dtype
        else (lambda: speed.phases(speed.build("fused", args, device), args))
        for name, dtype in SIDES.items()
    }
    built, found = warmed_up(sides, device)
    seconds = {name: ([], []) for name in built}
    for _ in range(args.rounds):
        for name, (roll, update, _) in built.items():
            for call, runs in zip((roll, update), seconds[name]):
                runs.append(speed.once(call, device)[0])
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    size = "{num_frames} x {height} x {width}".format(**speed.size_of(args))
    print(
        f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}; {size}, batch {args.batch}, "
        f"updates of {args.micro_batch}; ms a sample and denoising step, medians of {args.rounds} rounds\n"
    )
    print("| | rollout ms | update ms | error | rollout GiB | update GiB | times as fast, rollout / update |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for name, runs in seconds.items():
        per = [1000 / args.batch * median(own) / steps for own, steps in zip(runs, (args.steps, args.steps - 1))]
        first = first or per
        error, *peaks = found[name]
        print(
            f"| {name} | {per[0]:.1f} | {per[1]:.1f} | {error:.1e} | {peaks[0]:.2f} | {peaks[1]:.2f} | "
            f"{first[0] / per[0]:.2f} / {first[1] / per[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
