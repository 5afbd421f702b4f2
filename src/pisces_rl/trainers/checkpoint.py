"""Optimizer, schedule and random states on disk, as safetensors and JSON: no pickle."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def save_tree(tree: Any, path: str | os.PathLike) -> None:
    """Write a nested structure of tensors, arrays and plain values to `path`.safetensors and `path`.json.

    Raises:
        TypeError: a leaf is neither a tensor, an array, nor JSON.
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
        raise TypeError(f"a {type(value).__name__} cannot be saved without pickle.")

    skeleton = encode(tree)
    save_file(tensors, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(skeleton))


def load_tree(path: str | os.PathLike) -> Any:
    """What `save_tree` wrote; tensors on the CPU."""
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

    return decode(json.loads(Path(f"{path}.json").read_text()))


def random_state() -> dict:
    """The state of Python's, NumPy's and torch's global generators."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    """Put back what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])
