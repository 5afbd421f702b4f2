"""The reward contract: any callable that maps prompts and videos to numbers.

    def reward(prompts, videos, trainer_state=None, log_extra=None, log_metric=None, **columns):
        return [float(...) for video in videos]

`prompts` is a list of B strings, `videos` a float32 tensor (B, F, 3, H, W) in [0, 1], every further column of the data
set a list of B values. The callable returns B numbers (list, NumPy array or tensor); None where it does not apply. It
may be `async def`. `log_extra(name, values)` records B per-sample values, `log_metric(name, value)` one scalar. A
reward with the attribute `differentiable = True` returns a tensor that carries gradients to `videos`; one with
`compares_videos = True` is always given a whole rollout of a process, because a value depends on the other videos. One
with an attribute `offload` holds weights: where it is set to a device, the reward works there, and they lie on the CPU
between calls, or, where a call leaves a graph, until the panel's backward pass. One with a method `to` is moved by it
where the run has a `reward_device`. An async one may say in an attribute `unanswered` what it waited for when it was
cancelled, for the error of a `reward_timeout`. These attributes and `__name__` may be set on a wrapper or a partial:
the outermost one counts.

A `torch.nn.Module` with `forward(prompts, videos, ...)` is a reward. A panel puts it into evaluation mode and leaves
it on its device. The list of prompts, a column's list, and the lists and dicts in it are copied for each reward; what
lies deeper, and `videos`, are shared, and a reward that writes into `videos` is an error. Two rewards may not record
different values under one name; what a reward NAME, of which a panel has several, records as NAME_x is NAME_i_x there.
"""

import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .signature import layers, parameters_of

OVERSHOOT = 0.1  # how far beyond [0, 1] a pixel may lie: decoders overshoot, and 0..255 or -1..1 must not pass

RewardFunc = Callable[..., Sequence[float | None] | Tensor]


class RewardError(RuntimeError):
    """A reward failed; the message names the reward, the prompt and the mend. The run's checkpoints are whole."""


def is_differentiable(func: RewardFunc) -> bool:
    """Whether a reward says that it carries gradients to its videos."""
    return bool(_said(func, "differentiable", False))


def offload(func: RewardFunc, device: torch.device | str) -> None:
    """A reward's attribute `offload`, if it has one that is None, becomes `device`, in what it wraps as well."""
    if _said(func, "offload", device) is None:
        for layer in layers(func):
            if getattr(layer, "offload", device) is None:
                layer.offload = device


def move(func: RewardFunc, device: torch.device | str) -> None:
    """What a reward holds goes to `device` and works there: every layer of it that has a method `to`."""
    for layer in layers(func):
        if callable(getattr(layer, "to", None)):
            layer.to(device)


def compares_videos(func: RewardFunc) -> bool:
    """Whether a reward says that a video's value depends on the others of its call."""
    return bool(_said(func, "compares_videos", False))


def unanswered(func: RewardFunc) -> str:
    """What a reward that was cancelled says that it waited for; "" where it says nothing."""
    return _said(func, "unanswered", "")


def is_async(func: RewardFunc) -> bool:
    """Whether a reward, or what it wraps, is `async def`, itself, its `__call__` or its `forward`."""
    for layer in layers(func):
        call = layer.forward if isinstance(layer, nn.Module) else type(layer).__call__
        if inspect.iscoroutinefunction(layer) or inspect.iscoroutinefunction(call):
            return True
    return False


def reward_name(func: RewardFunc) -> str:
    """The name under which a reward is logged: the one set on it or on a wrapper, else its function's or class's."""
    *wrappers, func = layers(func)
    for wrapper in wrappers:
        name, code = getattr(wrapper, "__name__", None), getattr(wrapper, "__code__", None)
        if name not in (None, "<lambda>", code and code.co_name):  # a user set it, `def` did not
            return name
    if isinstance(func, torch.jit.ScriptModule):
        return func.original_name
    name = getattr(func, "__name__", None)
    if name is None or name == "<lambda>":
        name = type(func).__name__ if name is None else "lambda"
    return name


def _said(func: RewardFunc, attribute: str, default: object) -> object:
    """An attribute of a reward: the outermost one, of wrappers, partials and what they wrap."""
    return next((getattr(layer, attribute) for layer in layers(func) if hasattr(layer, attribute)), default)


def check_reward(func: RewardFunc) -> None:
    """Raise a ValueError for what cannot be a reward: not callable, a class, or without a readable signature."""
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
            f"reward {func!r} does not say which arguments it takes ({error}); call it from a function of your own, "
            "f(prompts, videos, **columns)."
        ) from error


def check_inputs(prompts: Sequence[str], videos: Tensor) -> None:
    """That there are B prompts for B videos (B, F, 3, H, W); for rewards that compute on both.

    Raises:
        TypeError: prompts is one string or no sequence of strings; videos is no tensor (a NumPy array, a list).
        ValueError: another shape, an empty axis, or more of one than of the other.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of strings, one per video, got {prompts!r}; put it into a list.")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: expected a list of strings, got {prompt!r} as prompt {row}.")
    if not isinstance(videos, Tensor):
        raise TypeError(
            f"videos: expected a tensor (B, F, 3, H, W) in [0, 1], got {type(videos).__name__}; convert an array with "
            "torch.from_numpy, a list with torch.stack."
        )
    if videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape:
        raise ValueError(f"videos: expected a tensor (B, F, 3, H, W), no axis empty, got {tuple(videos.shape)}.")
    if len(prompts) != len(videos):
        raise ValueError(f"prompts: expected one per video, got {len(prompts)} prompts for {len(videos)} videos.")


def check_pixels(videos: Tensor) -> None:
    """A ValueError that names the first video with pixels further than `OVERSHOOT` outside [0, 1], or NaN."""
    low, high = videos.detach().flatten(1).aminmax(dim=1)
    fine = (low >= -OVERSHOOT) & (high <= 1 + OVERSHOOT)  # False for NaN
    if not bool(fine.all()):
        row = int((~fine).nonzero()[0])
        raise ValueError(
            f"videos: video {row} has values from {float(low[row]):.3g} to {float(high[row]):.3g}; expected finite "
            "pixels in [0, 1]."
        )


def check_prompts(prompts: Sequence[str], special: Sequence[str], owner: str) -> None:
    """A ValueError for a prompt with a special token of a reward's model (an image's place, an end of turn), naming
    both: it would be read as one."""
    for prompt in prompts:
        if held := [token for token in special if token in prompt]:
            raise ValueError(f"prompts: {prompt!r} holds {held[0]!r}, a token of {owner}; leave it out.")


def checked_values(name: str, values, prompts: Sequence[str]) -> Tensor:
    """A reward's return value as (B,) fp32 on the CPU, NaN where it returned None.

    Raises:
        RewardError: not B numbers, or a value that is NaN or infinite.
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
    numbers = [math.nan if value is None else value for value in values]
    numbers = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    for row, value in enumerate(values):
        if value is not None and not numbers[row].isfinite():
            raise RewardError(
                f"reward {name!r} returned {value} for sample {row}, prompt {prompts[row]!r}. Training stops before "
                "it learns from that; return None where the reward does not apply, and mend the reward otherwise."
            )
    return numbers
