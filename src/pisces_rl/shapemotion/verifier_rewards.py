"""The verifier as rewards: plain callables for `reward_funcs` and `judge_funcs`.

Each is called `f(prompts=..., videos=..., trainer_state=, log_extra=, log_metric=, **columns)` and returns B floats.
If the trainer offers them, each logs every dimension of every sample (`log_extra`, None if the prompt does not ask for
it) and the batch's mean `correct`, `alignment` and `quality` (`log_metric`), all under "shapemotion/". Several of
these rewards on one batch cost one verification.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .verifier import Verification, verify

LogExtra = Callable[[str, list], None] | None
LogMetric = Callable[[str, float], None] | None

# (weak reference to the videos, their version, the prompts, the result) of the latest verification
_latest: tuple[weakref.ref, int, tuple[str, ...], Verification] | None = None


def shapemotion_alignment(
    prompts: Sequence[str],
    videos: torch.Tensor,
    trainer_state=None,
    log_extra: LogExtra = None,
    log_metric: LogMetric = None,
    **columns,
) -> list[float]:
    """Return the mean of the dimensions that the prompt asks for, in [0, 1]."""
    return _score(prompts, videos, log_extra, log_metric).alignment.tolist()


def shapemotion_quality(
    prompts: Sequence[str],
    videos: torch.Tensor,
    trainer_state=None,
    log_extra: LogExtra = None,
    log_metric: LogMetric = None,
    **columns,
) -> list[float]:
    """Mean of the quality dimensions, in [0, 1]. Prompt-free: alone it rewards frozen clips."""
    return _score(prompts, videos, log_extra, log_metric).quality.tolist()


def shapemotion_product(
    prompts: Sequence[str],
    videos: torch.Tensor,
    trainer_state=None,
    log_extra: LogExtra = None,
    log_metric: LogMetric = None,
    **columns,
) -> list[float]:
    """alignment x quality, in [0, 1]."""
    result = _score(prompts, videos, log_extra, log_metric)
    return (result.alignment * result.quality).tolist()


def shapemotion_correct(
    prompts: Sequence[str],
    videos: torch.Tensor,
    trainer_state=None,
    log_extra: LogExtra = None,
    log_metric: LogMetric = None,
    **columns,
) -> list[float]:
    """Return 1 if every dimension asked for passes, else 0."""
    return _score(prompts, videos, log_extra, log_metric).correct.astype(float).tolist()


def shapemotion_reward(
    prompts: Sequence[str],
    videos: torch.Tensor,
    trainer_state=None,
    log_extra: LogExtra = None,
    log_metric: LogMetric = None,
    **columns,
) -> list[float]:
    """Return correct + alignment x quality, in [0, 2]: the goal plus a dense signal towards it."""
    result = _score(prompts, videos, log_extra, log_metric)
    return (result.correct + result.alignment * result.quality).tolist()


def _score(prompts: Sequence[str], videos: torch.Tensor, log_extra: LogExtra, log_metric: LogMetric) -> Verification:
    result = _verify_once(prompts, videos)
    if log_extra is not None:
        for name, values in {**result.alignment_dimensions, **result.quality_dimensions}.items():
            log_extra(f"shapemotion/{name}", [None if math.isnan(value) else value for value in values.tolist()])
    if log_metric is not None:
        for name in ("correct", "alignment", "quality"):
            log_metric(f"shapemotion/{name}", float(np.mean(getattr(result, name))))
    return result


def _verify_once(prompts: Sequence[str], videos: torch.Tensor) -> Verification:
    """Call `verify`, cached for the latest tensor. The version counter detects in-place writes; inference tensors have
    no counter and are verified each time."""
    global _latest
    if not isinstance(videos, torch.Tensor) or videos.is_inference():
        return verify(videos, prompts)
    latest, key = _latest, (videos._version, tuple(prompts))
    if latest is not None and latest[0]() is videos and latest[1:3] == key:
        return latest[3]
    result = verify(videos, prompts)
    _latest = (weakref.ref(videos), *key, result)
    return result
