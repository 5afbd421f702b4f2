r"""Memory of a recipe on each GPU, without weights, without a GPU and without downloading a model.

    python examples/estimate_memory.py --config recipes/wan21_1.3b_grpo.yaml
    python examples/estimate_memory.py --config recipes/wan21_14b_grpo.yaml --gpu_gib 40 --sharding fsdp2 \
        --num_processes 8
    python examples/estimate_memory.py --method backprop --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 240 \
        --width 416 --num_frames 33 --decode_frames 2
    python examples/estimate_memory.py --table              # every recipe of recipes/architectures.json

--method is backprop or one of train_t2v.py's, where nothing names one grpo; other arguments are those of the script
that trains by it. A model of recipes/architectures.json is built from there; of any other one, a folder or a Hub id,
the configuration files are read. bf16 is on, as on a GPU, unless --bf16 false.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from grpo_t2v import lora_config
from rich.console import Console
from rich.table import Table
from train_t2v import MethodArguments, method_of

from pisces_rl import METHODS, RewardBackpropConfig, assets
from pisces_rl.cli import parse_arguments
from pisces_rl.estimate import MemoryEstimate, estimate_memory, weightless_pipeline

RECIPES = Path(__file__).parents[1] / "recipes"
ARCHITECTURES = json.loads((RECIPES / "architectures.json").read_text(encoding="utf-8"))
CONFIGS = {name: config for name, (_, config) in METHODS.items()} | {"backprop": RewardBackpropConfig}
GIB = 2**30


@dataclass
class EstimateArguments:
    gpu_gib: float | None = field(default=None, metadata={"help": "Memory of a GPU; says whether the run fits."})
    num_processes: int = field(default=1, metadata={"help": "GPUs that share weights."})
    sharding: str = field(
        default="none", metadata={"help": "none: every GPU holds all weights; fsdp2: denoisers are sharded."}
    )
    table: bool = field(default=False, metadata={"help": "Print one line for each recipe, and nothing else."})


def estimated(script: MethodArguments, config) -> MemoryEstimate:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    config.settle_call(assets.call_defaults(script.model))
    return estimate_memory(
        weightless_pipeline(script.model, dtype, ARCHITECTURES), config,
        lora_config(script, config),
    )


def parsed(arguments: list[str]) -> tuple:
    """(EstimateArguments, MethodArguments, config) of the command line for a run on a GPU, wherever it is parsed."""
    method = method_of(arguments, CONFIGS, unnamed="grpo")
    chosen = any(argument.split("=")[0] == "--bf16" for argument in arguments)
    return parse_arguments(EstimateArguments, MethodArguments, CONFIGS[method],
                           arguments=["--use_cpu", *([] if chosen else ["--bf16=true"]), *arguments])


def write(estimate: MemoryEstimate, console: Console) -> None:
    table = Table("GiB", *estimate.phases)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in estimate.resident.items():
        table.add_row(name, *[f"{size / GIB:.2f}"] * len(estimate.phases))
    for name in dict.fromkeys(name for parts in estimate.phases.values() for name in parts):
        table.add_row(name, *(f"{p[name] / GIB:.2f}" if name in p else "" for p in estimate.phases.values()))
    table.add_section()
    table.add_row("peak", *(f"{peak / GIB:.1f}" for peak in estimate.peaks.values()))
    console.print(table)
    console.print(", ".join(f"{name} {value:,}" for name, value in estimate.details.items()))
    console.print("Not counted: rewards, evaluation, the CUDA context, workspaces of kernels, fragmentation.")


def markdown_line(path: Path) -> str:
    _, script, config = parsed(["--config", str(path)])
    one = estimated(script, config)
    eight = one.fsdp2(8)
    size = f"{config.num_frames} x {config.height} x {config.width}"
    phases = " / ".join(f"{peak / GIB:.1f}" for peak in one.peaks.values())
    return (f"| `recipes/{path.name}` | {size} | {config.per_device_train_batch_size} | {phases} | "
            f"**{one.peak / GIB:.1f}** | {eight.peak / GIB:.1f} |")


def main() -> None:
    arguments = sys.argv[1:]
    own, script, config = parsed(arguments)
    if own.table and len(arguments) > 1:
        raise SystemExit("Write --table alone: it prints every recipe as it is.")
    if own.table:
        print("| recipe | frames x height x width | micro-batch | sampling / decoding / update | one GPU | "
              "FSDP2 over 8 |")
        print("|---|---|---|---|---|---|")
        for path in sorted(RECIPES.glob("*.yaml")):
            if any(f"model: {model}\n" in path.read_text(encoding="utf-8") for model in ARCHITECTURES):
                print(markdown_line(path), flush=True)
        return
    if own.sharding not in ("none", "fsdp2"):
        raise SystemExit(f"sharding={own.sharding!r} must be 'none' or 'fsdp2'.")
    if own.sharding == "none" and own.num_processes != 1:
        raise SystemExit(f"num_processes={own.num_processes}: without sharding every GPU takes what one takes; leave "
                         "it out, or set --sharding fsdp2.")
    if own.sharding == "fsdp2" and own.num_processes < 2:
        raise SystemExit(f"num_processes={own.num_processes}: fsdp2 needs at least 2 GPUs to share weights.")
    try:
        estimate = estimated(script, config)
        if own.sharding == "fsdp2":
            estimate = estimate.fsdp2(own.num_processes)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    write(estimate, Console(width=100))
    if own.gpu_gib is not None:
        peak = estimate.peak / GIB
        verdict = "fits" if peak < own.gpu_gib else "does not fit"
        print(f"{peak:.1f} GiB {verdict} {own.gpu_gib:g} GiB, with {own.gpu_gib - peak:.1f} GiB left for the rest.")


if __name__ == "__main__":
    main()
