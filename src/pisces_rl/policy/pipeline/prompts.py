"""Compute prompt embeddings once per prompt."""

import contextlib
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch.utils._pytree import tree_leaves

from ..schedule.scheduler import PolicyError


class PromptMemo:
    """Replaces a pipeline's `encode_prompt` and caches what it returned for each prompt.

    Prompts are encoded one at a time, so that an embedding depends on its prompt alone: not on the batch it first
    appeared in, nor on whether the run was resumed. The rows are then stacked. Calls that already have embeddings go
    to the pipeline unchanged, as do calls whose outputs do not stack (different lengths). If these return no mask, a
    PolicyError is raised: padding would count, so a video would change with its batch-mates (Latte cuts a prompt
    encoded alone and pads prompts encoded together).

    The cache key covers the contents of all arguments, including pixels of images (see `content_key`); a call with an
    argument that has no key is never cached.

    Args:
        encode_prompt: the pipeline's bound method; any signature with a `prompt` argument.
        size: number of prompts to cache; the least recently used is dropped first.
        pad: pad embeddings (1, L, D) of different lengths with zeros and set `padded`; for denoisers that take no
            mask, see `text_lengths`.
        during: returns a context that is entered once per call, while new prompts are encoded.
    """

    def __init__(
        self,
        encode_prompt,
        size: int = 256,
        pad: bool = False,
        during: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.encode_prompt, self.size, self.pad, self.padded = encode_prompt, size, pad, False
        self.during = during
        self.signature = inspect.signature(encode_prompt)
        self.memory: OrderedDict[Any, Any] = OrderedDict()
        # see `VideoPolicy.record_with`
        self.record: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __call__(self, *args, **kwargs):
        self.stack = None
        try:
            return self._remembered(*args, **kwargs)
        finally:
            if self.stack is not None:
                self.stack.close()

    def _encode(self, *args, **kwargs):
        if self.stack is None:
            self.stack = contextlib.ExitStack()
            self.stack.enter_context(self.during())
        return self.encode_prompt(*args, **kwargs)

    def _remembered(self, *args, **kwargs):
        bound = self.signature.bind(*args, **kwargs).arguments
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        prompt = bound.get("prompt")
        has_embeddings = any(isinstance(value, torch.Tensor) for name, value in bound.items() if "prompt" in name)
        if prompt is None and "batch_size" in bound:  # this many empty prompts
            prompt = [None] * bound["batch_size"]
        if not isinstance(prompt, list) or has_embeddings:
            return self.encode_prompt(*args, **kwargs)
        if len(prompt) > 1 and any(_several_images(value) for name, value in bound.items() if "prompt" not in name):
            with self.record("text"):
                return self._encode(*args, **kwargs)  # only the pipeline knows which image belongs to which prompt
        texts = {name: value for name, value in bound.items() if "prompt" in name and isinstance(value, list)}
        for name, values in texts.items():
            if len(values) != len(prompt):
                raise PolicyError(f"{name} has {len(values)} values for {len(prompt)} prompts; give a single string.")
        outputs = []
        for row, text in enumerate(prompt):
            one = bound | {name: values[row : row + 1] for name, values in texts.items()}
            one["prompt"] = None if text is None else [text]
            if "batch_size" in bound:
                one["batch_size"] = 1
            outputs.append(self._encode_one(one))
        unequal = self.pad and isinstance(outputs[0], tuple) and _lengths_differ(outputs)
        if unequal:
            self.padded, outputs = True, _padded(outputs)
        compared = len(prompt) > 1 and not unequal and not _batched(outputs[0])
        stacked = _stack(outputs, self._pair(bound) if compared else None)
        if stacked is not None:
            return stacked
        with self.record("text"):
            together = self._encode(*args, **kwargs)
        if not _masked(together):
            raise PolicyError(
                f"{self.encode_prompt.__qualname__} returns embeddings of different lengths without a mask, so a "
                "video would depend on the other prompts of its batch. Set the option that fixes the length in "
                "pipeline_kwargs (Latte: mask_feature=False)."
            )
        return together

    def _pair(self, bound: dict):
        """Encode the first prompt twice in one call, to find which outputs grow with the batch."""
        lists = (name for name, value in bound.items() if "prompt" in name and isinstance(value, list))
        return self._encode_one(bound | {name: bound[name][:1] * 2 for name in lists})

    def _encode_one(self, arguments: dict):
        key = content_key(arguments)
        if key is None or key not in self.memory:
            with self.record("text"), torch.no_grad():
                output = self._encode(**arguments)
            if key is None:
                return output
            self.memory[key] = output
            while len(self.memory) > self.size:
                self.memory.popitem(last=False)
        self.memory.move_to_end(key)
        return self.memory[key]


def content_key(value):
    """Return a hashable key of a value's contents, different for different contents; None for unsupported types.

    Supported are text, numbers, dtypes, devices, images, arrays and tensors, and lists, tuples and dicts of these.
    """
    kind = type(value).__name__
    if value is None or isinstance(value, (str, bytes, int, float, np.generic, torch.dtype, torch.device)):
        return kind, repr(value)
    if isinstance(value, Image):
        return kind, value.mode, value.size, repr(value.getpalette()), _digest(value.tobytes())
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return kind, str(value.dtype), tuple(value.shape), str(value.device), _digest(flat.numpy())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return kind, str(value.dtype), value.shape, _digest(np.ascontiguousarray(value))
    if isinstance(value, dict):
        value = sorted(value.items(), key=repr)
    if isinstance(value, (list, tuple)):
        keys = tuple(content_key(item) for item in value)
        return None if None in keys else (kind, keys)
    return None


def _digest(data) -> bytes:
    return hashlib.sha256(data).digest()


def _several_images(value) -> bool:
    """Return whether a value may hold one image per prompt."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(leaf, (Image, torch.Tensor, np.ndarray)) for leaf in tree_leaves(value))
    return isinstance(value, (torch.Tensor, np.ndarray))


def _is_text(value) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3


def _lengths_differ(outputs: list[tuple]) -> bool:
    return any(len({value.shape[1] for value in column}) > 1 for column in zip(*outputs) if _is_text(column[0]))


def _padded(outputs: list[tuple]) -> list[tuple]:
    """Pad embeddings (1, L, D) with zeros to the longest L of the batch."""
    columns = []
    for column in zip(*outputs):
        if _is_text(column[0]):
            longest = max(value.shape[1] for value in column)
            column = [F.pad(value, (0, 0, 0, longest - value.shape[1])) for value in column]
        columns.append(column)
    return list(zip(*columns))


def _masked(output) -> bool:
    """Return whether the outputs may include a mask: anything but embeddings of (batch, ..., length, width)."""
    leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
    return not all(isinstance(leaf, torch.Tensor) and leaf.ndim >= 3 for leaf in leaves)


def _batched(output) -> bool:
    """Return whether every tensor of a one-prompt output has one row."""
    if isinstance(output, tuple):
        return all(_batched(part) for part in output)
    return not isinstance(output, torch.Tensor) or (output.ndim > 0 and output.shape[0] == 1)


def _stack(outputs: list, pair=None):
    """Join one-prompt outputs (a tensor, None, or a tuple of these) along the batch; None if they do not fit.

    Args:
        outputs: one per prompt.
        pair: the output for the first prompt twice; needed if some tensor does not have one row per prompt, because it
            may be common to the batch, like Flux's ids of text positions.
    """
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        if pair is not None and not _batched(first):
            if pair.shape == first.shape:
                return first.clone() if all(torch.equal(o, first) for o in (pair, *outputs)) else None
            if first.ndim == 0 or pair.shape[0] != 2 * first.shape[0]:
                return None
        return torch.cat(outputs) if all(o.shape[1:] == first.shape[1:] for o in outputs) else None
    if not isinstance(first, tuple):
        return None
    joined = []
    for column, twice in zip(zip(*outputs), pair or first):
        stacked = None if column[0] is None else _stack(list(column), None if pair is None else twice)
        if stacked is None and column[0] is not None:
            return None
        joined.append(stacked)
    return tuple(joined)
