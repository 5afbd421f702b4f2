"""Metrics of a training step: collected where they arise, read and merged over processes when they are logged."""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..rewards import RewardTable


def as_floats(values: list[float | Tensor]) -> list[float]:
    """Metrics stay on their device until they are logged, so that no step waits for one."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    known = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(known) if isinstance(value, Tensor) else value for value in values]


def add_recorded(metrics: dict[str, list], table: RewardTable) -> None:
    """What rewards recorded: metrics, and means of per-sample values."""
    for name, recorded in table.metrics.items():
        metrics[name] += recorded
    for name, recorded in table.extras.items():
        known = [float(v) for v in recorded if isinstance(v, (bool, int, float))]
        if known:
            metrics[f"{name}/mean"].append(sum(known) / len(known))


def merged_over_processes(own: dict[str, list[float]], processes: int) -> dict[str, float]:
    """One value for each metric's values on all processes.

    `seconds/...` is a process's total since the last log, averaged over processes; `.../max_...` is the largest value;
    everything else is a mean.
    """
    values = defaultdict(list)
    for metrics in gather_object([own]):
        for name, some in metrics.items():
            values[name] += some
    merged = {}
    for name, some in values.items():
        if some and name.rsplit("/", 1)[-1].startswith("max_"):
            merged[name] = max(some)
        elif some:
            merged[name] = sum(some) / (processes if name.startswith("seconds/") else len(some))
    return merged
