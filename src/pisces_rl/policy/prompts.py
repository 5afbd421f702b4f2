"""Prompt embeddings, computed once per prompt."""

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .scheduler import PolicyError


class PromptMemo:
    """Stands in for a pipeline's `encode_prompt` and remembers what it returned for each prompt.

    Prompts are encoded one at a time, so that an embedding depends on its prompt alone: not on the batch it first
    appeared in, nor on whether the run was resumed. The rows are then stacked. Calls that already carry embeddings,
    or whose outputs do not stack (different lengths), go to the pipeline as they are; but without a mask its padding
    would count, and a video would change with its batch-mates (Latte cuts a prompt alone and pads prompts together).

    Args:
        encode_prompt: the pipeline's bound method; any signature with a `prompt` argument.
        size: number of prompts to remember, least recently used first out.
    """

    def __init__(self, encode_prompt, size: int = 256):
        self.encode_prompt, self.size = encode_prompt, size
        self.signature = inspect.signature(encode_prompt)
        self.memory: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, *args, **kwargs):
        bound = self.signature.bind(*args, **kwargs).arguments
        prompt = bound.get("prompt")
        has_embeddings = any(isinstance(value, torch.Tensor) for value in bound.values())
        if not isinstance(prompt, list) or has_embeddings:
            return self.encode_prompt(*args, **kwargs)
        negative = bound.get("negative_prompt")
        outputs = []
        for row, text in enumerate(prompt):
            one = dict(bound, prompt=[text])
            if isinstance(negative, list):
                one["negative_prompt"] = [negative[row]]
            outputs.append(self._encode_one(one))
        stacked = _stack(outputs)
        if stacked is not None:
            return stacked
        if not _masked(outputs[0]):
            raise PolicyError(
                f"{self.encode_prompt.__qualname__} gives prompts embeddings of different lengths and no mask, so "
                "that a video would depend on the other prompts of its batch. Set what makes the length fixed in "
                "pipeline_kwargs (Latte: mask_feature=False)."
            )
        return self.encode_prompt(*args, **kwargs)

    def _encode_one(self, arguments: dict):
        key = repr(sorted((name, value) for name, value in arguments.items()))
        if key not in self.memory:
            with torch.no_grad():
                self.memory[key] = self.encode_prompt(**arguments)
            while len(self.memory) > self.size:
                self.memory.popitem(last=False)
        self.memory.move_to_end(key)
        return self.memory[key]


def _masked(output) -> bool:
    """Whether a mask may be among the outputs: anything but embeddings of (batch, ..., length, width)."""
    leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
    return not all(isinstance(leaf, torch.Tensor) and leaf.ndim >= 3 for leaf in leaves)


def _stack(outputs: list):
    """Join one-prompt outputs (a tensor or None, or a tuple of them) along the batch; None where they do not fit."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs) if all(o.shape[1:] == first.shape[1:] for o in outputs) else None
    if not isinstance(first, tuple):
        return None
    joined = []
    for column in zip(*outputs):
        stacked = None if column[0] is None else _stack(list(column))
        if stacked is None and column[0] is not None:
            return None
        joined.append(stacked)
    return tuple(joined)
