"""A panel of rewards that are called together."""

import asyncio
import contextlib
import copy
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import get_rank, is_available, is_initialized

from .contract import (
    RewardError,
    RewardFunc,
    RewardFuncs,
    check_reward,
    checked_values,
    is_async,
    is_differentiable,
    move,
    offload,
    reward_name,
    unanswered,
)
from .coroutines import Coroutines
from .encodings import shared_encodings
from .inputs import Untouched, own_lists
from .signature import OFFERED, arguments, layers
from .table import RewardTable
from .time_limit import time_limit


class RewardPanel:
    """A set of rewards, all called on each batch. Async rewards start first and run alongside the others. Rewards that
    share an encoder encode each video once.

    Args:
        funcs: a reward or a list of them: callables (see `pisces_rl.rewards.contract`) or names for `load_reward`.
        timeout: seconds that a reward may take for a batch, see `time_limit`; 0 means no limit.
        device: where the rewards compute; videos and gradients are copied there and back. None: each stays in place.

    Attributes:
        record: `record("rewards/NAME")` is entered while a reward is called.

    Raises:
        ValueError: an element cannot be a reward, or no reward has its name. Calls raise `RewardError`, which names
            the reward that failed, took too long or wrote into the videos.
    """

    def __init__(
        self,
        funcs: RewardFuncs,
        timeout: float = 0.0,
        device: torch.device | str | None = None,
    ):
        self.timeout, self.device = timeout, device
        self.funcs = _loaded(_as_list(funcs), device)
        names = [reward_name(func) for func in self.funcs]
        self.names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        if len(set(self.names)) < len(names):
            raise ValueError(f"rewards named {names} would be logged under the same name; set other names (__name__).")
        for module in [layer for func in self.funcs for layer in layers(func)]:
            if isinstance(module, nn.Module):
                module.eval()
        self.record: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __len__(self) -> int:
        return len(self.funcs)

    def only(self, places: Sequence[int]) -> "RewardPanel":
        """Return a panel of some of the rewards, with the names they have here."""
        panel = copy.copy(self)
        panel.funcs, panel.names = [self.funcs[i] for i in places], [self.names[i] for i in places]
        return panel

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], videos: Tensor, columns: dict[str, list], trainer_state: Any = None
    ) -> RewardTable:
        videos = videos.to(self.device)
        tables: dict[int, RewardTable] = {}
        pending, guard = {}, Untouched(videos)
        order = sorted(range(len(self)), key=lambda i: not is_async(self.funcs[i]))  # async first: they run meanwhile
        with Coroutines() as coroutines:
            with shared_encodings():
                for i in order:
                    name, start = self.names[i], time.perf_counter()
                    tables[i], offered = self._offer(prompts, videos, columns, trainer_state, width=1)
                    with self.record(f"rewards/{name}"):
                        values = self._call(name, self.funcs[i], offered(name))
                        if inspect.isawaitable(values):
                            pending[i] = coroutines.start(self._awaited(name, values, self.funcs[i]))
                            continue
                        tables[i].values[:, 0] = checked_values(name, values, prompts)
                        guard.check(name, *(self.names[k] for k in pending))
                    tables[i].seconds[name] = time.perf_counter() - start
            for i, future in pending.items():
                name, too_slow = self.names[i], self._timeout_message(*(self.names[k] for k in pending))
                # wait_for cannot end a reward that blocks its thread; all others end a second before this limit.
                with self.record(f"rewards/{name}"), time_limit(self.timeout and self.timeout + 1, too_slow):
                    values, tables[i].seconds[name] = future.result()
                    tables[i].values[:, 0] = checked_values(name, values, prompts)
            if pending:
                guard.check(*(self.names[i] for i in pending))
        if not tables:
            return RewardTable(torch.full((len(prompts), 0), torch.nan, device="cpu"))
        return RewardTable.side_by_side([tables[i] for i in range(len(self))], [[i] for i in range(len(self))])

    def offload(self, device: torch.device | str) -> None:
        """Set `offload` on rewards that hold weights (`contract.offload`): they compute on `device`, or on the panel's
        device if it has one, and keep their weights on the CPU between calls."""
        for func in self.funcs:
            offload(func, device if self.device is None else self.device)

    def check_differentiable(self) -> None:
        """Raise a ValueError naming the rewards that do not declare gradients, or that are async."""
        without = [name for name, func in zip(self.names, self.funcs) if not is_differentiable(func)]
        if without:
            raise ValueError(
                f"rewards {without} are not differentiable (no attribute differentiable = True), so gradients cannot "
                "flow back to the videos; train on them with VideoGRPOTrainer, which needs only their values."
            )
        waiting = [name for name, func in zip(self.names, self.funcs) if is_async(func)]
        if waiting:
            raise ValueError(
                f"rewards {waiting} are async, but only synchronous rewards can return gradients; define them with "
                "def instead of async def, or train on them with VideoGRPOTrainer."
            )

    @torch.enable_grad()
    def with_gradients(
        self, prompts: list[str], videos: Tensor, columns: dict[str, list], trainer_state: Any = None
    ) -> tuple[RewardTable, list[Tensor]]:
        """Return the table and, per reward, the gradient of its sum over samples with respect to the videos.

        Each gradient has the shape of the videos.

        Raises:
            RewardError: a reward failed, returned no tensor with a graph, or its gradient is not finite.
        """
        home, videos = videos.device, videos.detach().to(self.device).requires_grad_()
        table, offered = self._offer(prompts, videos, columns, trainer_state, width=len(self))
        gradients, guard = [], Untouched(videos)
        with shared_encodings(backward=True) as encodings:
            for i, (name, func) in enumerate(zip(self.names, self.funcs)):
                start = time.perf_counter()
                with self.record(f"rewards/{name}"):
                    values = self._call(name, func, offered(name))
                    table.values[:, i] = checked_values(name, values, prompts)
                    guard.check(name)
                    if not isinstance(values, Tensor) or not values.requires_grad:
                        raise RewardError(
                            f"reward {name!r} declares differentiable = True, but returned a {type(values).__name__} "
                            "that is not connected to the videos: remove .detach(), .item() or torch.no_grad, or use "
                            "VideoGRPOTrainer."
                        )
                    with _named(name):  # rewards that share an encoder share part of their graphs
                        (gradient,) = torch.autograd.grad(values.sum(), videos, retain_graph=i + 1 < len(self))
                    bad = (~gradient.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
                    if bad:
                        raise RewardError(
                            f"reward {name!r} has a NaN or infinite gradient for sample {bad[0]}, prompt "
                            f"{prompts[bad[0]]!r}. Training stops before it learns from that."
                        )
                del values  # frees the graph, which holds the weights
                encodings.backward_done()
                gradients.append(gradient.to(home))
                table.seconds[name] = time.perf_counter() - start
        return table, gradients

    def _offer(
        self, prompts: list[str], videos: Tensor, columns: dict[str, list], trainer_state: Any, width: int
    ) -> tuple[RewardTable, Callable[[str], dict]]:
        """Return an empty table of `width` rewards and a function that maps a reward's name to the arguments on offer;
        what the reward logs goes into the table."""
        if taken := sorted(set(OFFERED) & set(columns)):
            raise ValueError(f"columns {taken} clash with arguments that every reward is offered; rename them.")
        table = RewardTable(torch.full((len(prompts), width), torch.nan, device="cpu"))

        own_names = dict(zip(self.names, map(reward_name, self.funcs)))

        def offered(reward: str) -> dict:
            scalars: dict[str, list[float]] = {}

            def unique(name: str) -> str:
                prefix = f"{own_names[reward]}_"
                return f"{reward}_{name.removeprefix(prefix)}" if name.startswith(prefix) else name

            def log_extra(name: str, values: Sequence) -> None:
                name = unique(name)
                if len(values) != len(prompts):
                    raise ValueError(f"log_extra({name!r}) got {len(values)} values for {len(prompts)} samples.")
                values = [v.item() if isinstance(v, (Tensor, np.generic)) else v for v in values]
                table.claim(reward, name, "extras", values)
                table.extras[name] = values

            def log_metric(name: str, value: float) -> None:
                name = unique(name)
                own = scalars.setdefault(name, [])
                own.append(float(value))
                table.claim(reward, name, "metrics", own)
                if table.recorded_by[name] == reward:
                    table.metrics[name] = own

            return dict(
                own_lists(columns),
                prompts=list(prompts),
                videos=videos,
                trainer_state=trainer_state,
                log_extra=log_extra,
                log_metric=log_metric,
            )

        return table, offered

    def _call(self, name: str, func: RewardFunc, offered: dict) -> Any:
        with _named(name), self._limited(name):
            positional, named = arguments(func, offered)
            return func(*positional, **named)

    def _limited(self, *names: str) -> contextlib.AbstractContextManager:
        return time_limit(self.timeout, self._timeout_message(*names))

    def _timeout_message(self, *names: str) -> str:
        rank = f" on rank {get_rank()}" if is_available() and is_initialized() else ""
        return (
            f"reward {' or '.join(map(repr, names))} did not return within {self.timeout:g} s (reward_timeout){rank}. "
            "Nothing is lost: fix the reward or raise reward_timeout, and resume from the last checkpoint."
        )

    async def _awaited(self, name: str, awaitable: Awaitable, func: RewardFunc) -> tuple[object, float]:
        """Return the awaited value and the seconds it took."""
        start = time.perf_counter()
        with _named(name):
            try:
                return await asyncio.wait_for(awaitable, self.timeout or None), time.perf_counter() - start
            except asyncio.TimeoutError as error:
                if not self.timeout or time.perf_counter() - start < self.timeout:
                    raise  # a timeout inside the reward itself
                raise RewardError(f"{self._timeout_message(name)} {unanswered(func)}".rstrip()) from error


def _as_list(funcs: Any) -> list:
    """Return a list of rewards from one or several; a `torch.nn.ModuleList` counts as several."""
    if isinstance(funcs, (Mapping, Set, nn.ModuleDict)):
        raise ValueError(
            f"reward_funcs or judge_funcs is a {type(funcs).__name__}; pass a list in the order of reward_weights. "
            "Each reward is logged under its __name__."
        )
    one = isinstance(funcs, str) or callable(funcs) or not isinstance(funcs, Iterable)
    if isinstance(funcs, nn.ModuleList) or not one:
        return list(funcs)
    return [] if funcs is None else [funcs]


def _loaded(funcs: list, device: torch.device | str | None) -> list[RewardFunc]:
    """Load rewards given by name and move all to `device`. Invalid entries are rejected before any weights load."""
    if any(isinstance(func, str) for func in funcs):
        from .loading import is_known, load_reward  # needs transformers

        funcs = [load_reward(f) if isinstance(f, str) and not is_known(f) else f for f in funcs]
    for func in funcs:
        if not isinstance(func, str):
            check_reward(func)
    funcs = [load_reward(func, device=device) if isinstance(func, str) else func for func in funcs]
    if device is not None:
        for func in funcs:
            move(func, device)
    return funcs


class _named:
    """A context manager that turns any exception of a reward into a RewardError naming it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> "_named":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> Literal[False]:
        if isinstance(error, Exception) and not isinstance(error, RewardError):
            advice = (
                ""
                if "unexpected keyword argument" not in str(error)
                else (
                    " A function with **kwargs receives every argument of a reward: use functools.wraps in a "
                    "decorator, or add **columns to the function it calls."
                )
            )
            raise RewardError(
                f"reward {self.name!r} raised {kind.__name__}: {error}.{advice} Nothing is lost: fix the reward and "
                "resume from the last checkpoint."
            ) from error
        return False
