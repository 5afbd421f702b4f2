"""Metrics of a training step: collected where they arise, read and merged over processes when they are logged."""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ....rewards import RewardError, RewardTable

#: Names, or first parts of names before a "/", of the trainers' own metrics; a reward must not record under them.
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
    """Metrics stay on their device until they are logged, so that no step waits for one."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    known = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(known) if isinstance(value, Tensor) else value for value in values]


def check_recorded(table: RewardTable) -> None:
    """A RewardError where a reward recorded under a name of the trainer's own, which would replace or join it, or
    per-sample values `x` are recorded beside a scalar `x/mean`."""
    for name, reward in table.recorded_by.items():
        if name.split("/")[0] in OWN_NAMES or name.startswith(("eval_", "train_", "eval/", "train/")):
            raise RewardError(
                f"reward {reward!r} records {name!r}, which is a name of the trainer's own metrics; record under "
                f"another name, for instance {f'my_{name}'!r}."
            )
    for name in table.extras:
        if f"{name}/mean" in table.metrics:
            raise RewardError(
                f"reward {table.recorded_by[name]!r} records {name!r} for each sample, whose mean is logged as "
                f"{f'{name}/mean'!r}, and reward {table.recorded_by[f'{name}/mean']!r} records a metric of that name; "
                "rename one of them."
            )


def add_recorded(metrics: dict[str, list], table: RewardTable) -> None:
    """What rewards recorded: metrics, and means of per-sample values. Raises as `check_recorded`."""
    check_recorded(table)
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
