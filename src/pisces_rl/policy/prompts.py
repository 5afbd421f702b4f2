"""Prompt embeddings, computed once per prompt."""

import inspect
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F


class PromptMemo:
    """Stands in for a pipeline's `encode_prompt` and remembers what it returned for each prompt.

    Prompts are encoded one at a time, so that an embedding depends on its prompt alone: not on the batch it first
    appeared in, nor on whether the run was resumed. The rows are then stacked. Calls that already carry embeddings,
    or whose outputs do not stack (different lengths), go to the pipeline as they are.

    Args:
        encode_prompt: the pipeline's bound method; any signature with a `prompt` argument.
        size: number of prompts to remember, least recently used first out.
        pad: embeddings (1, L, D) of different lengths are padded with zeros, and `padded` is set: for denoisers that
            take no mask, see `text_lengths`.
    """

    def __init__(self, encode_prompt, size: int = 256, pad: bool = False):
        self.encode_prompt, self.size, self.pad, self.padded = encode_prompt, size, pad, False
        self.signature = inspect.signature(encode_prompt)
        self.memory: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, *args, **kwargs):
        bound = self.signature.bind(*args, **kwargs).arguments
        prompt = bound.get("prompt")
        has_embeddings = any(isinstance(value, torch.Tensor) for value in bound.values())
        if prompt is None and "batch_size" in bound:  # as many empty prompts
            prompt = [None] * bound["batch_size"]
        if not isinstance(prompt, list) or has_embeddings:
            return self.encode_prompt(*args, **kwargs)
        negative = bound.get("negative_prompt")
        outputs = []
        for row, text in enumerate(prompt):
            one = dict(bound, prompt=None if text is None else [text])
            if "batch_size" in bound:
                one["batch_size"] = 1
            if isinstance(negative, list):
                one["negative_prompt"] = [negative[row]]
            outputs.append(self._encode_one(one))
        if self.pad and isinstance(outputs[0], tuple):
            outputs = self._padded(outputs)
        stacked = _stack(outputs)
        return self.encode_prompt(*args, **kwargs) if stacked is None else stacked

    def _padded(self, outputs: list[tuple]) -> list[tuple]:
        columns = []
        for column in zip(*outputs):
            if isinstance(column[0], torch.Tensor) and column[0].ndim == 3:
                longest = max(value.shape[1] for value in column)
                self.padded |= any(value.shape[1] < longest for value in column)
                column = [F.pad(value, (0, 0, 0, longest - value.shape[1])) for value in column]
            columns.append(column)
        return list(zip(*columns))

    def _encode_one(self, arguments: dict):
        key = repr(sorted((name, value) for name, value in arguments.items()))
        if key not in self.memory:
            with torch.no_grad():
                self.memory[key] = self.encode_prompt(**arguments)
            while len(self.memory) > self.size:
                self.memory.popitem(last=False)
        self.memory.move_to_end(key)
        return self.memory[key]


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
