"""Several rewards asked together."""

import asyncio
import contextlib
import copy
import inspect
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.distributed import get_rank, is_available, is_initialized

from .contract import (
    RewardError,
    RewardFunc,
    accepted_arguments,
    checked_values,
    is_async,
    is_differentiable,
    offload,
    reward_name,
)
from .encodings import shared_encodings
from .time_limit import time_limit


@dataclass
class RewardTable:
    """What a panel returned for B samples.

    Attributes:
        values: (B, number of rewards) fp32 on the CPU, NaN where a reward does not apply.
        extras: {name: B values} per-sample values the rewards recorded.
        metrics: {name: scalars} the rewards recorded.
        seconds: {reward: wall-clock seconds}.
    """

    values: Tensor
    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def stack(parts: Sequence["RewardTable"]) -> "RewardTable":
        """One table of all samples, of the tables of some each; an extra that a part lacks is None there."""
        table = RewardTable(torch.cat([part.values for part in parts]))
        for name in dict.fromkeys(name for part in parts for name in part.extras):
            table.extras[name] = [v for part in parts for v in part.extras.get(name, [None] * len(part.values))]
        table._add(parts)
        return table

    @staticmethod
    def side_by_side(tables: Sequence["RewardTable"], places: Sequence[Sequence[int]]) -> "RewardTable":
        """One table of all rewards; the columns of `tables[k]` are at `places[k]`."""
        width = sum(len(own) for own in places)
        joined = RewardTable(torch.full((len(tables[0].values), width), torch.nan))
        for table, own in zip(tables, places):
            joined.values[:, own] = table.values
            joined.extras |= table.extras
        joined._add(tables)
        return joined

    def _add(self, tables: Sequence["RewardTable"]) -> None:
        for table in tables:
            for name, values in table.metrics.items():
                self.metrics.setdefault(name, []).extend(values)
            for name, seconds in table.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class RewardPanel:
    """Calls every reward on a batch; async rewards run at the same time. Rewards that share an encoder have it encode
    each video once.

    Args:
        funcs: a reward callable or a list of them, see `pisces_rl.rewards.contract`.
        timeout: seconds that a reward may take for a batch, see `time_limit`; 0: as long as it likes.

    Attributes:
        record: record("rewards/NAME") is entered while a reward is called.

    Raises:
        ValueError: an element is not callable. `RewardError` on calls, naming the reward that failed or took too long.
    """

    def __init__(self, funcs: RewardFunc | Sequence[RewardFunc] | None, timeout: float = 0.0):
        self.timeout = timeout
        self.funcs = [] if funcs is None else [funcs] if callable(funcs) else list(funcs)
        for func in self.funcs:
            if not callable(func):
                raise ValueError(
                    f"reward {func!r} is not callable; pass functions f(prompts, videos, **columns) -> list of floats."
                )
        names = [reward_name(func) for func in self.funcs]
        self.names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]

        self.record = contextlib.nullcontext

    def __len__(self) -> int:
        return len(self.funcs)

    def only(self, places: Sequence[int]) -> "RewardPanel":
        """A panel of some of the rewards, under their names here."""
        panel = copy.copy(self)
        panel.funcs, panel.names = [self.funcs[i] for i in places], [self.names[i] for i in places]
        return panel

    @torch.no_grad()
    def __call__(self, prompts: list[str], videos: Tensor, columns: dict[str, list],
                 trainer_state=None) -> RewardTable:
        table, offered = self._offer(prompts, videos, columns, trainer_state)
        pending = {}
        with shared_encodings():
            for i, (name, func) in enumerate(zip(self.names, self.funcs)):
                start = time.perf_counter()
                with self.record(f"rewards/{name}"):
                    with _named(name), self._limited(name):
                        values = func(**accepted_arguments(func, offered))
                    if inspect.isawaitable(values):
                        pending[i] = values
                    else:
                        table.values[:, i] = checked_values(name, values, prompts)
                table.seconds[name] = time.perf_counter() - start
        if pending:
            start = time.perf_counter()
            for i, values in zip(pending, self._await_all(pending)):
                table.values[:, i] = checked_values(self.names[i], values, prompts)
                table.seconds[self.names[i]] += time.perf_counter() - start
        return table

    def offload(self, device: torch.device | str) -> None:
        """Rewards that hold weights work on `device`, and these lie on the CPU between calls (`contract.offload`)."""
        for func in self.funcs:
            offload(func, device)

    def check_differentiable(self) -> None:
        """A ValueError that names the rewards which do not say that they carry gradients, or are async."""
        without = [name for name, func in zip(self.names, self.funcs) if not is_differentiable(func)]
        if without:
            raise ValueError(
                f"rewards {without} are not differentiable (they have no attribute differentiable = True), so no "
                "gradient can be propagated back; train on them with VideoGRPOTrainer, which needs values only."
            )
        waiting = [name for name, func in zip(self.names, self.funcs) if is_async(func)]
        if waiting:
            raise ValueError(
                f"rewards {waiting} are async: gradients come from rewards that are computed at once; write them "
                "with def, or train on them with VideoGRPOTrainer."
            )

    @torch.enable_grad()
    def with_gradients(self, prompts: list[str], videos: Tensor, columns: dict[str, list],
                       trainer_state=None) -> tuple[RewardTable, list[Tensor]]:
        """The table, and for each reward the gradient of its sum over samples with respect to the videos, like them.

        Raises:
            RewardError: a reward failed, returned no tensor with a graph, or its gradient is not finite.
        """
        videos = videos.detach().requires_grad_()
        table, offered = self._offer(prompts, videos, columns, trainer_state)
        gradients = []
        with shared_encodings(backward=True):
            for i, (name, func) in enumerate(zip(self.names, self.funcs)):
                start = time.perf_counter()
                with _named(name), self._limited(name):
                    values = func(**accepted_arguments(func, offered))
                table.values[:, i] = checked_values(name, values, prompts)
                if not isinstance(values, Tensor) or not values.requires_grad:
                    raise RewardError(
                        f"reward {name!r} says differentiable = True, but returned a {type(values).__name__} without "
                        "a graph to the videos: leave out .detach(), .item(), torch.no_grad, or use VideoGRPOTrainer."
                    )
                with _named(name):  # rewards of one encoder share a part of their graphs
                    (gradient,) = torch.autograd.grad(values.sum(), videos, retain_graph=i + 1 < len(self))
                bad = (~gradient.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
                if bad:
                    raise RewardError(
                        f"reward {name!r} has a gradient that is NaN or infinite for sample {bad[0]}, prompt "
                        f"{prompts[bad[0]]!r}. Training stops before it learns from that."
                    )
                gradients.append(gradient)
                table.seconds[name] = time.perf_counter() - start
        return table, gradients

    def _offer(self, prompts: list[str], videos: Tensor, columns: dict[str, list],
               trainer_state) -> tuple[RewardTable, dict]:
        """An empty table, and the arguments that rewards may take; what they record goes to the table."""
        table = RewardTable(torch.full((len(prompts), len(self)), torch.nan))

        def log_extra(name: str, values: Sequence) -> None:
            if len(values) != len(prompts):
                raise ValueError(f"log_extra({name!r}) got {len(values)} values for {len(prompts)} samples.")
            table.extras[name] = [v.item() if isinstance(v, (Tensor, np.generic)) else v for v in values]

        def log_metric(name: str, value: float) -> None:
            table.metrics.setdefault(name, []).append(float(value))

        offered = dict(columns, prompts=prompts, videos=videos, trainer_state=trainer_state, log_extra=log_extra,
                       log_metric=log_metric)
        return table, offered

    def _limited(self, *names: str) -> contextlib.AbstractContextManager:
        return time_limit(self.timeout, self._too_slow(*names))

    def _too_slow(self, *names: str) -> str:
        rank = f" on rank {get_rank()}" if is_available() and is_initialized() else ""
        return (
            f"reward {' or '.join(map(repr, names))} did not return within {self.timeout:g} s (reward_timeout){rank}. "
            "Nothing is lost: mend the reward or raise reward_timeout, and resume from the last checkpoint."
        )

    def _await_all(self, pending: dict) -> list:
        """The values of all awaitables, in a thread of their own: a notebook's has a running event loop already."""

        async def one(i: int, awaitable):
            with _named(self.names[i]):
                try:
                    return await asyncio.wait_for(awaitable, self.timeout or None)
                except asyncio.TimeoutError as error:
                    raise RewardError(self._too_slow(self.names[i])) from error

        async def together():
            return await asyncio.gather(*(one(i, awaitable) for i, awaitable in pending.items()))

        @torch.no_grad()
        def run() -> list:
            return asyncio.run(together())

        # One that blocks its thread does not time out by itself; the others are ended before.
        with time_limit(self.timeout and self.timeout + 1, self._too_slow(*(self.names[i] for i in pending))):
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(run).result()


class _named:
    """Turns whatever a reward raises into a RewardError that names it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, RewardError):
            raise RewardError(
                f"reward {self.name!r} raised {kind.__name__}: {error}. Nothing is lost: mend the reward and resume "
                "from the last checkpoint."
            ) from error
        return False
