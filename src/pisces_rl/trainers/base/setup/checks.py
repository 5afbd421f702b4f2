"""Checks before a model is loaded: datasets of prompts, rewards, and combinations of settings."""

import os
import re
import sys

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

from ....policy import FULL
from ....rewards import OFFERED, RewardPanel
from ..distributed.sharded_optimizer import OPTIMIZERS


def check_dataset(name: str, dataset, several: bool = False) -> None:
    """Raise a ValueError unless this is a dataset of prompts or, with `several`, a dict of them."""
    if several and isinstance(dataset, dict):
        check_set_names(name, list(dataset))
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part)
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name} is a {type(dataset).__name__}; pass a datasets.Dataset with a `prompt` column.")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} has columns {dataset.column_names} but none named `prompt`; rename the text column.")
    if taken := [column for column in dataset.column_names if column in OFFERED]:
        raise ValueError(
            f"{name} has columns {taken}, but the trainer passes arguments of these names ({', '.join(OFFERED)}) to "
            "every reward, so the columns would never reach one; rename them, or remove them with remove_columns."
        )
    shown = dataset.format
    if not (shown["type"] in (None, "custom") or shown["output_all_columns"] or "prompt" in shown["columns"]):
        raise ValueError(
            f"{name} has the format {shown['type']!r} with the columns {shown['columns']}, which leaves out `prompt`; "
            "pass output_all_columns=True to set_format, or call with_format(None)."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; it needs at least one prompt.")
    # A slice is read 100 times faster, but a custom transform would then process all rows at once.
    column = dataset["prompt"] if shown["type"] == "custom" else dataset["prompt"][:]
    for row, prompt in enumerate(column):
        if not isinstance(prompt, str):
            raise ValueError(f"{name} row {row}: prompt is {prompt!r}; every prompt must be a string.")


def check_set_names(name: str, keys: list) -> None:
    """Raise a ValueError if the name of an evaluation set is not a valid file name on every system."""
    for i, key in enumerate(keys):
        problem = _not_a_file_name(key)
        if problem is None and key.casefold() in (str(other).casefold() for other in keys[:i]):
            problem = "differs from another set's name only in case"
        if problem is not None:
            raise ValueError(
                f"{name}[{key!r}]: the name {problem}, but names of samples and sheets contain it. Use a name like "
                "'held_out' or 'new prompts'."
            )
    if not keys:
        raise ValueError(f"{name} is an empty dict; it needs at least one dataset, or pass None.")


def _not_a_file_name(key) -> str | None:
    """Return what makes `key` invalid as a file name, or None."""
    if not isinstance(key, str):
        return f"is a {type(key).__name__}, not a string"
    if not key:
        return "is empty"
    bad = sorted({c for c in key if c in '/\\:*?"<>|' or not c.isprintable()})
    if bad:
        return f"has characters that file names must not have: {bad}"
    if key != key.strip() or key.startswith(".") or key.endswith("."):
        return "starts or ends with a space or a dot"
    if re.fullmatch(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", key, re.IGNORECASE):
        return "is reserved on Windows"
    try:
        long = len(os.fsencode(key)) > 100
    except UnicodeEncodeError:
        return f"cannot be encoded by this file system ({sys.getfilesystemencoding()}; set PYTHONUTF8=1)"
    return "is longer than 100 bytes" if long else None


def check_output_dir(folder: str) -> None:
    """Create the output folder of a run; raise a ValueError if that fails."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir={folder!r} cannot be created ({error.strerror}); choose a writable folder, not a file."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={folder!r} is read-only; choose a writable folder.")


def check_best_metric(name: str | None, prefix: str, metrics: dict[str, float]) -> None:
    """Raise a ValueError if an evaluation lacks `metric_for_best_model`, before the first save needs it."""
    wanted = None if name is None else name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
    if wanted is not None and wanted not in metrics:
        raise ValueError(
            f"metric_for_best_model={name!r} is not a metric of this evaluation; choose one of {sorted(metrics)}."
        )


def check_reference(args, uses_reference: bool) -> None:
    """Raise a ValueError if `continue_reference` is set but no term of the loss uses a reference."""
    if args.continue_reference == "adapter" and not uses_reference:
        raise ValueError(
            "continue_reference='adapter' has no effect: there is neither a KL penalty (beta) nor an auxiliary loss "
            "that uses a reference (ConsistencyDistillation). Leave it out, or set one of these."
        )


def check_full_fine_tuning(args, sharding: FullyShardedDataParallelPlugin | None, zero_stage: int | None) -> None:
    """Raise a ValueError if `peft_config="full"` is combined with a setting that needs frozen or unsharded weights."""

    def refuse(what: str, instead: str) -> None:
        raise ValueError(f"peft_config={FULL!r} trains all weights of the denoisers, but {what}: {instead}.")

    train_lora = "train a LoRA (peft_config=None)"
    if args.base_precision is not None:
        refuse(f"base_precision={args.base_precision!r} rounds frozen weights", f"unset it, or {train_lora}")
    if args.continue_from:
        refuse(
            f"continue_from={args.continue_from!r} is a saved LoRA",
            "merge it into the base first "
            "(pipe.load_lora_weights, then pipe.fuse_lora and pipe.unload_lora_weights) and pass that pipeline as "
            "model, or leave peft_config out to train the LoRA further",
        )
    if sharding is not None and args.optim not in OPTIMIZERS:
        refuse(
            f"optim={str(args.optim.value)!r} may need whole weights, and FSDP2 gives each process only a part",
            f"set one of {list(OPTIMIZERS)}, or run with ZeRO-2 or without sharding",
        )
    if sharding is not None and not sharding.reshard_after_forward:
        refuse(
            "fsdp_reshard_after_forward=false keeps gathered weights, which the optimizer would then change",
            "set it to true, or shard only the optimizer states with ZeRO-2 (recipes/accelerate/deepspeed_zero2.yaml)",
        )
    if sharding is not None and isinstance(sharding.cpu_offload, CPUOffloadPolicy):
        refuse(
            "fsdp_offload_params=true keeps them in host memory, where an optimizer step is slow",
            f"set it to false and use more processes, or {train_lora}",
        )
    if zero_stage == 3:
        refuse(
            "zero_stage=3 partitions frozen weights only",
            "set zero_stage=2 (deepspeed_zero2.yaml), which shards gradients and optimizer states over the "
            f"processes, or {train_lora}",
        )
    if args.context_parallel > 1:
        refuse(
            f"context_parallel={args.context_parallel} sums only the gradients of adapter layers over the parts of "
            f"a video",
            f"leave it 1, or {train_lora}",
        )
    if "denoiser" in (args.offload or ()):
        refuse(
            "offload moves frozen weights only", f"leave 'denoiser' out of offload={args.offload!r}, or {train_lora}"
        )


def checked_weights(weights: list[float] | None, rewards: RewardPanel, optional: bool) -> Tensor:
    """Return the (R,) weights of the rewards, 1 each by default.

    Raises:
        ValueError: there is no reward although one is needed, or the number of weights differs from that of rewards.
    """
    if not len(rewards) and not optional:
        raise ValueError("reward_funcs is empty; pass at least one callable f(prompts, videos, **columns).")
    weights = weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise ValueError(f"reward_weights has {len(weights)} values for {len(rewards)} rewards; set one per reward.")
    return torch.tensor(weights, dtype=torch.float32)


def settle_evaluation(args, eval_dataset, rewards: RewardPanel) -> None:
    """Fill in the evaluation settings of `args`; raise a ValueError if they need what is not there."""
    if eval_dataset is None:
        args.eval_on_start = False
        if args.eval_strategy != "no":
            raise ValueError(f"eval_strategy={str(args.eval_strategy.value)!r} needs an eval_dataset.")
    if args.load_best_model_at_end and args.metric_for_best_model == "loss":
        args.metric_for_best_model, args.greater_is_better = "reward", True
    if args.load_best_model_at_end and args.metric_for_best_model == "reward" and not len(rewards):
        raise ValueError(
            "load_best_model_at_end=True, but without rewards there is no default metric to choose the model by: set "
            "metric_for_best_model to a judge, for instance 'judges/NAME/mean' (with several evaluation sets "
            "'SET_judges/NAME/mean')."
        )
