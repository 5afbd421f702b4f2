"""Write and read checkpoints: complete folders whose states are safetensors and JSON, without pickle."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ....run_files import own_checkpoints
from .resume import last_checkpoint


def write_whole(final: Path, write: Callable[[Path], None], rank: int, publishes: bool) -> None:
    """Write a checkpoint into a staging folder and rename it, so that a folder checkpoint-N is always complete.

    Args:
        final: path of the checkpoint.
        write: writes this process's files into the given folder; all processes call it.
        rank: index of this process.
        publishes: whether this process renames the folder.

    Raises:
        OSError: on every process, if one could not write. An earlier folder of the same name stays intact.
    """
    staging, error = final.with_name(f".incomplete-{final.name}"), None
    try:
        write(staging)
    except (OSError, SafetensorError) as caught:
        error = f"rank {rank}: {caught}"
    errors = [e for e in gather_object([error]) if e]
    if errors:
        if publishes:
            shutil.rmtree(staging, ignore_errors=True)
        last = last_checkpoint(str(final.parent)) or "none"
        raise OSError(
            f"checkpoint {final} could not be written ({'; '.join(errors)}). Earlier checkpoints are intact (the "
            f"last: {last}); free some disk space, or lower save_total_limit, and resume from it."
        )
    if publishes:
        old = final.with_name(f".incomplete-old-{final.name}")
        if final.exists():  # the run was resumed from an earlier checkpoint
            os.replace(final, old)
        os.replace(staging, final)
        shutil.rmtree(old, ignore_errors=True)


def remove_incomplete(output_dir: str | os.PathLike) -> None:
    """Remove staging folders left by a process that was killed while writing."""
    for leftover in Path(output_dir).glob(".incomplete-*"):
        if re.fullmatch(r"\.incomplete-(adapter|(old-)?checkpoint-[0-9]+)", leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_old_checkpoints(
    output_dir: str | os.PathLike, limit: int | None, keep: Sequence[str | os.PathLike], own: Container[str]
) -> None:
    """Delete the oldest checkpoints of the run beyond `limit`.

    Args:
        output_dir: folder of the run.
        limit: number of checkpoints to keep; None or 0 deletes none.
        keep: checkpoints that are never deleted: the newest, from which a run resumes, and the best.
        own: names of files that the run wrote (`RunFiles.own`); other checkpoints belong to the user and stay.
    """
    if not limit or limit < 0:
        return
    kept = {os.path.abspath(path) for path in keep}
    # Sort by time, because a run resumed from an earlier checkpoint writes smaller numbers later.
    oldest = sorted(
        [(step, path) for step, path in own_checkpoints(output_dir).items() if path.name in own],
        key=lambda item: (_written(item[1]), item[0]),
    )
    spare = [path for _, path in oldest if os.path.abspath(path) not in kept]
    for path in spare[: max(0, len(oldest) - max(limit, len(oldest) - len(spare)))]:
        shutil.rmtree(path, ignore_errors=True)


def _written(checkpoint: Path) -> int:
    return (checkpoint / "policy.json").stat().st_mtime_ns


def save_tree(tree: Any, path: str | os.PathLike) -> None:
    """Write a nested structure of tensors, arrays and plain values to `path`.safetensors and `path`.json.

    Raises:
        TypeError: a leaf is not a tensor, an array or a JSON value.
    """
    tensors: dict[str, torch.Tensor] = {}

    def encode(value):
        if isinstance(value, (torch.Tensor, np.ndarray)):
            key = str(len(tensors))
            tensors[key] = torch.as_tensor(value).detach().cpu().contiguous().clone()
            return {"tensor": key, "array": isinstance(value, np.ndarray)}
        if isinstance(value, dict):
            return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
        if isinstance(value, (tuple, list)):
            return {"tuple" if isinstance(value, tuple) else "list": [encode(v) for v in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"a {type(value).__name__} cannot be saved without pickle; use tensors or JSON values.")

    skeleton = encode(tree)
    save_file(tensors, f"{path}.safetensors")
    # safetensors makes the file readable only by its owner; use the permissions of the folder.
    os.chmod(f"{path}.safetensors", Path(path).parent.stat().st_mode & 0o666)
    Path(f"{path}.json").write_text(json.dumps(skeleton), encoding="utf-8")


def load_tree(path: str | os.PathLike) -> Any:
    """Load what `save_tree` wrote, with tensors on the CPU."""
    tensors = load_file(f"{path}.safetensors")

    def decode(value):
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            tensor = tensors[value["tensor"]]
            return tensor.numpy() if value["array"] else tensor
        if "dict" in value:
            return {decode(k): decode(v) for k, v in value["dict"]}
        if "tuple" in value:
            return tuple(decode(v) for v in value["tuple"])
        return [decode(v) for v in value["list"]]

    return decode(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))


def random_state() -> dict:
    """Return the states of Python's, NumPy's and torch's global random generators."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    """Restore the states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])
