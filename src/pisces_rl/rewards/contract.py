"""The reward contract: a reward is any callable that maps prompts and videos to numbers.

    def reward(prompts, videos, trainer_state=None, log_extra=None, log_metric=None, **columns):
        return [float(...) for video in videos]

`prompts` is a list of B strings and `videos` a float32 tensor (B, F, 3, H, W) in [0, 1]. Every other column of the
dataset arrives as a list of B values. The callable returns B numbers (list, NumPy array or tensor), with None for
samples to which the reward does not apply. It may be `async def`. `log_extra(name, values)` records B per-sample
values, `log_metric(name, value)` one scalar.

Optional attributes. They and `__name__` may also be set on a wrapper or a partial; the outermost one wins.

- `differentiable = True`: the reward returns a tensor that carries gradients to `videos`.
- `compares_videos = True`: a value depends on the other videos, so each call gets a process's whole rollout.
- `offload`: the reward holds weights. If it is set to a device, the reward computes there and keeps its weights on the
  CPU between calls; after a call that leaves a graph, they stay on the device until the panel's backward pass.
- `to`: a method that moves the reward to the run's `reward_device`, if the run has one.
- `unanswered`: for an async reward that was cancelled, what it was waiting for; shown in the `reward_timeout` error.

A `torch.nn.Module` with `forward(prompts, videos, ...)` is a reward. A panel sets it to evaluation mode and leaves it
on its device. Each reward gets copies of the list of prompts, of each column's list, and of the lists and dicts in it.
Anything nested deeper, and `videos`, is shared; a reward that writes into `videos` is an error. Two rewards may not
record different values under one name. If a panel has several rewards called NAME, what the i-th of them records as
NAME_x is stored as NAME_i_x.
"""

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .signature import layers, parameters_of

OVERSHOOT = 0.1  # tolerance outside [0, 1]: decoders overshoot slightly, while 0..255 or -1..1 must be rejected

Values = Sequence[float | None] | np.ndarray | Tensor
RewardFunc = Callable[..., Values | Awaitable[Values]]
#: What a panel and the trainers take: a reward, its name for `load_reward`, or several of them.
RewardFuncs = RewardFunc | str | Sequence[RewardFunc | str] | nn.ModuleList | None


class RewardError(RuntimeError):
    """A reward failed. The message names the reward, the prompt and the fix. The run's checkpoints are intact."""


def is_differentiable(func: RewardFunc) -> bool:
    """Return whether a reward declares that it carries gradients to its videos."""
    return bool(_attribute(func, "differentiable", False))


def offload(func: RewardFunc, device: torch.device | str) -> None:
    """Set `offload` to `device` on every layer of a reward where it is None, if the outermost one is None."""
    if _attribute(func, "offload", device) is None:
        for layer in layers(func):
            if getattr(layer, "offload", device) is None:
                layer.offload = device


def move(func: RewardFunc, device: torch.device | str) -> None:
    """Move a reward to `device`: call `to` on every layer that has it."""
    for layer in layers(func):
        if callable(getattr(layer, "to", None)):
            layer.to(device)


def compares_videos(func: RewardFunc) -> bool:
    """Return whether a reward declares that a video's value depends on the other videos of the call."""
    return bool(_attribute(func, "compares_videos", False))


def unanswered(func: RewardFunc) -> str:
    """Return what a cancelled reward says it was waiting for, or ""."""
    return _attribute(func, "unanswered", "")


def is_async(func: RewardFunc) -> bool:
    """Return whether a reward or anything it wraps is `async def`: the function, its `__call__` or its `forward`."""
    for layer in layers(func):
        call = layer.forward if isinstance(layer, nn.Module) else type(layer).__call__
        if inspect.iscoroutinefunction(layer) or inspect.iscoroutinefunction(call):
            return True
    return False


def reward_name(func: RewardFunc) -> str:
    """Return the name a reward is logged under: one set on it or on a wrapper, else its function's or class's name."""
    *wrappers, func = layers(func)
    for wrapper in wrappers:
        name, code = getattr(wrapper, "__name__", None), getattr(wrapper, "__code__", None)
        if name not in (None, "<lambda>", code and code.co_name):  # set by the user, not by `def`
            return name
    if isinstance(func, torch.jit.ScriptModule):
        return func.original_name
    name = getattr(func, "__name__", None)
    if name is None or name == "<lambda>":
        name = type(func).__name__ if name is None else "lambda"
    return name


def _attribute(func: RewardFunc, attribute: str, default: object) -> Any:
    """Return an attribute from the outermost layer (wrapper, partial or wrapped function) that has it."""
    return next((getattr(layer, attribute) for layer in layers(func) if hasattr(layer, attribute)), default)


def check_reward(func: RewardFunc) -> None:
    """Raise a ValueError if `func` is not callable, is a class, or has no readable signature."""
    if not callable(func):
        raise ValueError(
            f"reward {func!r} is not callable; pass functions f(prompts, videos, **columns) -> list of floats."
        )
    if inspect.isclass(func):
        raise ValueError(f"reward {func.__name__} is a class; pass an instance of it: {func.__name__}(...).")
    *_, module = layers(func)
    if isinstance(module, nn.Module) and getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise ValueError(f"reward {reward_name(func)} has no forward(prompts, videos), so it cannot be called.")
    try:
        parameters_of(func)
    except ValueError as error:
        raise ValueError(
            f"reward {func!r} does not say which arguments it takes ({error}); wrap it in a function of your own, "
            "f(prompts, videos, **columns)."
        ) from error


def check_inputs(prompts: Sequence[str], videos: Tensor) -> None:
    """Check that there are B prompts for B videos (B, F, 3, H, W), for rewards that use both.

    Raises:
        TypeError: `prompts` is a single string or not a sequence of strings, or `videos` is not a tensor.
        ValueError: `videos` has another shape or an empty axis, or the numbers of prompts and videos differ.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of strings, one per video, got {prompts!r}; wrap it in a list.")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: expected a list of strings, got {prompt!r} as prompt {row}.")
    if not isinstance(videos, Tensor):
        raise TypeError(
            f"videos: expected a tensor (B, F, 3, H, W) in [0, 1], got {type(videos).__name__}; convert an array with "
            "torch.from_numpy, a list with torch.stack."
        )
    if videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape:
        raise ValueError(f"videos: expected a tensor (B, F, 3, H, W) with no empty axis, got {tuple(videos.shape)}.")
    if len(prompts) != len(videos):
        raise ValueError(f"prompts: expected one per video, got {len(prompts)} prompts for {len(videos)} videos.")


def check_pixels(videos: Tensor) -> None:
    """Raise a ValueError naming the first video with NaN or with pixels more than `OVERSHOOT` outside [0, 1]."""
    low, high = videos.detach().flatten(1).aminmax(dim=1)
    fine = (low >= -OVERSHOOT) & (high <= 1 + OVERSHOOT)  # False for NaN
    if not bool(fine.all()):
        row = int((~fine).nonzero()[0])
        raise ValueError(
            f"videos: video {row} has values from {float(low[row]):.3g} to {float(high[row]):.3g}; expected finite "
            "pixels in [0, 1]."
        )


def check_prompts(prompts: Sequence[str], special: Sequence[str], owner: str) -> None:
    """Raise a ValueError if a prompt contains a special token of a reward's model (image placeholder, end of turn),
    which the model would interpret as such."""
    for prompt in prompts:
        if held := [token for token in special if token in prompt]:
            raise ValueError(f"prompts: {prompt!r} contains {held[0]!r}, a special token of {owner}; remove it.")


def checked_values(name: str, values: Any, prompts: Sequence[str]) -> Tensor:
    """Return a reward's values as (B,) fp32 on the CPU, NaN for None.

    Raises:
        RewardError: there are not B numbers, or a value is NaN or infinite.
    """
    given = type(values).__name__
    try:
        if isinstance(values, (str, bytes, dict)):
            raise TypeError("its elements are not one number per video")
        if isinstance(values, np.ndarray):
            values = values.ravel().tolist()
        if isinstance(values, Tensor):
            values = values.detach().flatten().tolist()
        values = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward {name!r} returned {given}, which is not a list of numbers: {error}. Return one float (or None) "
            "per video."
        ) from error
    if len(values) != len(prompts):
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {len(prompts)} videos; return one float (or None) "
            "per video, in order."
        )
    known = [math.nan if value is None else value for value in values]
    numbers = torch.tensor(known, dtype=torch.float32, device="cpu")
    for row, value in enumerate(values):
        if value is not None and not numbers[row].isfinite():
            raise RewardError(
                f"reward {name!r} returned {value} for sample {row}, prompt {prompts[row]!r}. Training stops before "
                "it learns from that. Return None if the reward does not apply to a sample; otherwise fix the reward."
            )
    return numbers
