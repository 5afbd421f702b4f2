"""Values and records of rewards for a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .contract import RewardError


@dataclass
class RewardTable:
    """What a panel returned for B samples.

    Attributes:
        values: (B, number of rewards) fp32 on the CPU, NaN where a reward does not apply.
        extras: {name: B values} per-sample values that rewards recorded.
        metrics: {name: scalars} that rewards recorded.
        seconds: {reward: wall-clock seconds}.
        recorded_by: {name of an extra or a metric: the reward that recorded it}.
    """

    values: Tensor
    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    recorded_by: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def stack(parts: Sequence["RewardTable"]) -> "RewardTable":
        """Stack tables of different samples; an extra that a part lacks is None for its samples."""
        table = RewardTable(torch.cat([part.values for part in parts]))
        for name in dict.fromkeys(name for part in parts for name in part.extras):
            table.extras[name] = [v for part in parts for v in part.extras.get(name, [None] * len(part.values))]
        for part in parts:
            table.recorded_by |= part.recorded_by
            for name, values in part.metrics.items():
                table.metrics.setdefault(name, []).extend(values)
            table._add_seconds(part)
        return table

    def rows(self, places: Sequence[int]) -> "RewardTable":
        """Return the samples at these places, in this order."""
        extras = {name: [values[place] for place in places] for name, values in self.extras.items()}
        return replace(self, values=self.values[list(places)], extras=extras)

    @staticmethod
    def side_by_side(tables: Sequence["RewardTable"], places: Sequence[Sequence[int]]) -> "RewardTable":
        """Join tables of different rewards; the columns of `tables[k]` go to `places[k]`.

        Raises RewardError if rewards of two tables recorded different values under one name.
        """
        width = sum(len(own) for own in places)
        joined = RewardTable(torch.full((len(tables[0].values), width), torch.nan, device="cpu"))
        for table, own in zip(tables, places):
            joined.values[:, own] = table.values
            for kind in ("extras", "metrics"):
                for name, values in getattr(table, kind).items():
                    joined.claim(table.recorded_by[name], name, kind, values)
                    getattr(joined, kind).setdefault(name, values)
            joined._add_seconds(table)
        return joined

    def claim(self, reward: str, name: str, kind: str, values: list) -> None:
        """Check that `reward` may record `values` under `name`: any other reward must have recorded the same.

        Raises RewardError naming both rewards.
        """
        owner = self.recorded_by.setdefault(name, reward)
        known = getattr(self, kind).get(name, [])[: len(values)]
        if owner != reward and not (len(known) == len(values) and all(map(_equal, known, values))):
            raise RewardError(
                f"rewards {owner!r} and {reward!r} both record {name!r}, with different values; record under another "
                f"name in one of them, for instance {f'my_{name}'!r}."
            )

    def _add_seconds(self, table: "RewardTable") -> None:
        for name, seconds in table.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _equal(x: object, y: object) -> bool:
    return x is y or bool(x == y) or (x != x and y != y)  # NaN equals NaN
