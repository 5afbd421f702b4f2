"""Metrics of training steps: read from the device and merged over processes only when they are logged."""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ....rewards import RewardError, RewardTable

#: Names of the trainers' metrics, or their part before the first "/"; rewards must not record under these names.
OWN_NAMES = {
    "reward",
    "rewards",
    "judges",
    "reward_std",
    "frac_reward_zero_std",
    "reward_correlation",
    "grad_cosine",
    "loss",
    "consistency_loss",
    "kl",
    "ratio",
    "clip_ratio",
    "replay",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "step_time",
    "seconds",
    "velocity",
    "weight",
    "margin",
    "total_flos",
    "num_input_tokens_seen",
}


def as_floats(values: list[float | Tensor]) -> list[float]:
    """Convert metrics to floats with one device transfer; until they are logged they stay on their device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    known = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(known) if isinstance(value, Tensor) else value for value in values]


def check_recorded(table: RewardTable) -> None:
    """Check the names under which rewards recorded values.

    Raises:
        RewardError: a name belongs to the trainer's metrics, or both per-sample values `x` and a scalar `x/mean` were
            recorded.
    """
    for name, reward in table.recorded_by.items():
        if name.split("/")[0] in OWN_NAMES or name.startswith(("eval_", "train_", "eval/", "train/")):
            raise RewardError(
                f"reward {reward!r} records {name!r}, which is the name of a trainer metric; choose another name, for "
                f"instance {f'my_{name}'!r}."
            )
    for name in table.extras:
        if f"{name}/mean" in table.metrics:
            raise RewardError(
                f"reward {table.recorded_by[name]!r} records {name!r} for each sample, and its mean is logged as "
                f"{f'{name}/mean'!r}, but reward {table.recorded_by[f'{name}/mean']!r} records a metric of that name; "
                "rename one of them."
            )


def add_recorded(metrics: dict[str, list], table: RewardTable) -> None:
    """Add what rewards recorded to `metrics`: scalars, and means of per-sample values. Raises as `check_recorded`."""
    check_recorded(table)
    for name, recorded in table.metrics.items():
        metrics[name] += recorded
    for name, recorded in table.extras.items():
        known = [float(v) for v in recorded if isinstance(v, (bool, int, float))]
        if known:
            metrics[f"{name}/mean"].append(sum(known) / len(known))


def merged_over_processes(own: dict[str, list[float]], processes: int) -> dict[str, float]:
    """Merge each metric's values over all processes into one value.

    `seconds/...` is the total of a process since the last log, averaged over processes. `.../max_...` is the largest
    value. Everything else is a mean.
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
