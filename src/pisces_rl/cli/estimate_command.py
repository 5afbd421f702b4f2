"""`pisces-rl estimate`: estimate a run's memory per GPU, without weights, a GPU or a model download.

Models in recipes/architectures.json are built from that file; for any other folder or Hub id, the configuration files
are read. bf16 is on, as on a GPU, unless you pass --bf16 false.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pisces_rl import assets
from pisces_rl.estimate import MemoryEstimate, estimate_memory, weightless_pipeline

from . import RECIPES, usage_error
from .arguments import UNNAMED, method_of, parse_arguments
from .train_command import TRAINERS, MethodArguments
from .training_inputs import lora_config

ARCHITECTURES = RECIPES / "architectures.json"
GIB = 2**30


@dataclass
class EstimateArguments:
    gpu_gib: float | None = field(
        default=None, metadata={"help": "Memory of a GPU in GiB; prints whether the run fits."}
    )
    num_processes: int = field(default=1, metadata={"help": "Number of GPUs that share the weights."})
    sharding: str = field(
        default="none",
        metadata={
            "choices": ["none", "fsdp2"],
            "help": "none: every GPU holds all weights; fsdp2: the denoisers are sharded.",
        },
    )
    table: bool = field(default=False, metadata={"help": "Print only a table with one line per recipe."})


def architectures() -> dict:
    """Return configurations by model. An installed package has none and reads the model's folder or Hub id instead."""
    return json.loads(ARCHITECTURES.read_text(encoding="utf-8")) if ARCHITECTURES.is_file() else {}


def estimated(script: MethodArguments, config) -> MemoryEstimate:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    config.settle_call(assets.call_defaults(script.model))
    return estimate_memory(
        weightless_pipeline(script.model, dtype, architectures()),
        config,
        lora_config(script, config),
    )


def parsed(arguments: Sequence[str], prog: str | None = None) -> tuple:
    """Parse (EstimateArguments, MethodArguments, config) for a run on a GPU, even on a machine without one."""
    method = method_of(arguments, TRAINERS, UNNAMED["estimate"], prog)
    chosen = any(argument.split("=")[0] == "--bf16" for argument in arguments)
    return parse_arguments(
        EstimateArguments,
        MethodArguments,
        TRAINERS[method][1],
        prog=prog,
        arguments=["--use_cpu", *([] if chosen else ["--bf16=true"]), *arguments],
    )


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
    console.print("Not counted: rewards, evaluation, the CUDA context, kernel workspaces, fragmentation.")


def markdown_line(path: Path) -> str:
    _, script, config = parsed(["--config", str(path)])
    one = estimated(script, config)
    eight = one.fsdp2(8)
    size = f"{config.num_frames} x {config.height} x {config.width}"
    phases = " / ".join(f"{peak / GIB:.1f}" for peak in one.peaks.values())
    return (
        f"| `recipes/{path.name}` | {size} | {config.per_device_train_batch_size} | {phases} | "
        f"**{one.peak / GIB:.1f}** | {eight.peak / GIB:.1f} |"
    )


def main(arguments: Sequence[str], prog: str | None = None) -> None:
    own, script, config = parsed(arguments, prog)
    if own.table and len(arguments) > 1:
        usage_error("--table takes no other arguments: it prints every recipe as it is.", prog)
    if own.table:
        print(
            "| recipe | frames x height x width | micro-batch | sampling / decoding / update | one GPU | "
            "FSDP2 over 8 |"
        )
        print("|---|---|---|---|---|---|")
        for path in sorted(RECIPES.glob("*.yaml")):
            if any(f"model: {model}\n" in path.read_text(encoding="utf-8") for model in architectures()):
                print(markdown_line(path), flush=True)
        return
    if own.sharding == "none" and own.num_processes != 1:
        usage_error(
            f"--num_processes {own.num_processes}: without sharding every GPU needs as much memory as one; leave it "
            "out, or set --sharding fsdp2.",
            prog,
        )
    if own.sharding == "fsdp2" and own.num_processes < 2:
        usage_error(f"--num_processes {own.num_processes}: fsdp2 needs at least 2 GPUs to share weights.", prog)
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
