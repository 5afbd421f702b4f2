"""The reward contract: what may be returned, how rewards are named, and what happens when one fails."""

import asyncio
import functools
import math
import threading

import numpy as np
import pytest
import torch

from pisces_rl.rewards import RewardError, RewardPanel, reward_name

PROMPTS = ["first", "second", "third"]
VIDEOS = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ask(funcs, columns=None, prompts=PROMPTS, **kwargs):
    return RewardPanel(funcs)(list(prompts), VIDEOS[: len(prompts)], columns or {}, **kwargs)


def returning(values):
    def reward(prompts, videos, **columns):
        return values

    return reward


class Scaled:
    """A reward with state: a callable instance."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, videos, **kwargs):
        return self.scale * videos.mean(dim=(1, 2, 3, 4))


class AsyncScaled(Scaled):
    async def __call__(self, videos, **kwargs):
        await asyncio.sleep(0)
        return self.scale * videos.mean(dim=(1, 2, 3, 4))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, videos, **kwargs):
        return self.weight * videos.mean(dim=(1, 2, 3, 4))


# --- what a reward may be and return ---


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, None],
        (1, 2.5, None),
        np.array([1, 2.5, None]),
        np.array([1, 2.5, np.pi]),
        np.array([[1], [2.5], [3]]),
        torch.tensor([1, 2.5, 3]),
        torch.tensor([[1], [2.5], [3]]),
        torch.tensor([1, 2.5, 3], dtype=torch.bfloat16),
        [np.float32(1), 2.5, True],
        [torch.tensor(1.0), torch.tensor([2.5]), 3],
        torch.tensor([1, 2.5, 3], requires_grad=True),
    ],
    ids=[
        "list",
        "tuple",
        "objects",
        "array",
        "column",
        "tensor",
        "tensor-column",
        "bfloat16",
        "mixed",
        "tensors",
        "grad",
    ],
)
def test_returned_numbers(values):
    table = ask(returning(values))
    assert table.values.shape == (3, 1) and table.values.dtype == torch.float32 and not table.values.requires_grad
    assert table.values[:2, 0].tolist() == [1.0, 2.5]


def test_none_becomes_nan():
    assert [math.isnan(v) for v in ask(returning([None, 1.0, None])).values[:, 0].tolist()] == [True, False, True]


def test_arguments_that_a_reward_does_not_name_are_not_passed():
    seen = {}

    def only_videos(videos):
        return videos.mean(dim=(1, 2, 3, 4))

    def one_column(prompts, color, trainer_state):
        seen.update(color=color, state=trainer_state, prompts=prompts)
        return [0.0] * 3

    def everything(prompts, videos, **kwargs):
        seen["kwargs"] = set(kwargs)
        return [0.0] * 3

    columns = {"color": ["r", "g", "b"], "size": [1, 2, 3]}
    table = ask([only_videos, one_column, everything], columns, trainer_state="s")
    torch.testing.assert_close(table.values[:, 0], VIDEOS.mean(dim=(1, 2, 3, 4)))
    assert seen["color"] == ["r", "g", "b"] and seen["state"] == "s" and seen["prompts"] == PROMPTS
    assert seen["kwargs"] == {"color", "size", "trainer_state", "log_extra", "log_metric"}


def test_instances_partials_modules_and_bound_methods():
    def scaled(prompts, videos, scale):
        return [scale] * len(prompts)

    table = ask([Scaled(2.0), functools.partial(scaled, scale=3.0), Network(), Scaled(4.0).__call__])
    mean = VIDEOS.mean(dim=(1, 2, 3, 4))
    for column, expected in enumerate((2 * mean, torch.full((3,), 3.0), 2 * mean, 4 * mean)):
        torch.testing.assert_close(table.values[:, column], expected)


def test_the_panel_runs_without_gradients():
    def reward(videos, **kwargs):
        assert not torch.is_grad_enabled()
        return videos.mean(dim=(1, 2, 3, 4))

    async def later(videos, **kwargs):
        await asyncio.sleep(0)
        assert not torch.is_grad_enabled()
        return videos.mean(dim=(1, 2, 3, 4))

    with torch.enable_grad():
        ask([reward, later])


def test_one_callable_or_none():
    assert len(RewardPanel(Scaled(1.0))) == 1
    assert len(RewardPanel(None)) == 0 and len(RewardPanel([])) == 0
    assert RewardPanel(None)(PROMPTS, VIDEOS, {}).values.shape == (3, 0)


# --- names ---


def test_names():
    def plain(prompts):
        return [0.0]

    assert reward_name(plain) == "plain"
    assert reward_name(Scaled(1)) == "Scaled" and reward_name(Network()) == "Network"
    assert reward_name(lambda prompts: [0.0]) == "lambda"
    assert reward_name(functools.partial(functools.partial(plain, a=1), b=2)) == "plain"


def test_duplicate_names_are_numbered():
    panel = RewardPanel([Scaled(1), Network(), Scaled(2), lambda prompts: [0.0], lambda prompts: [1.0]])
    assert panel.names == ["Scaled_0", "Network", "Scaled_2", "lambda_3", "lambda_4"]


# --- errors ---


@pytest.mark.parametrize("funcs", [3, [Scaled(1), 3]])
def test_not_callable(funcs):
    with pytest.raises(ValueError, match="is not callable; pass functions f"):
        RewardPanel(funcs)


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, float("nan"), 1.0], "returned nan for sample 1, prompt 'second'"),
        (torch.tensor([1.0, 1.0, math.inf]), "returned inf for sample 2, prompt 'third'"),
        ([-math.inf, 1.0, 1.0], "returned -inf for sample 0, prompt 'first'"),
        ([1.0, 1e39, 1.0], "sample 1, prompt 'second'"),  # finite in Python, infinite in fp32
        ([1.0, 2.0], "returned 2 values for 3 videos"),
        (torch.zeros(3, 2), "returned 6 values for 3 videos"),
        (1.0, "returned float, which is not a list of numbers"),
        (None, "returned NoneType, which is not a list of numbers"),
        (["good", "bad", "ugly"], "returned list, which is not a list of numbers"),
        ("123", "returned str, which is not a list of numbers"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "returned dict, which is not a list of numbers"),
    ],
    ids=str,
)
def test_bad_values(values, message):
    with pytest.raises(RewardError, match="reward 'reward'") as caught:
        ask(returning(values))
    assert message in str(caught.value)


def test_what_a_reward_raises_is_named():
    def broken(prompts, videos, **kwargs):
        raise KeyError("colour")

    async def broken_later(prompts, **kwargs):
        raise ZeroDivisionError("nothing there")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError: 'colour'") as caught:
        ask(broken)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="reward 'broken_later' raised ZeroDivisionError: nothing there"):
        ask([Scaled(1), broken_later])


def test_a_missing_column_is_named():
    def needs(prompts, scene):
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="reward 'needs' raised TypeError.*scene"):
        ask(needs)


def test_interrupts_pass_through():
    def interrupted(prompts, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(interrupted)


# --- async rewards ---


def meeting(parties: int):
    """Rewards that end only when all of them run at once: one after another they would wait for ever."""
    barrier = asyncio.Barrier(parties) if hasattr(asyncio, "Barrier") else _Barrier(parties)

    def member(value):
        async def reward(prompts, **kwargs):
            await asyncio.wait_for(barrier.wait(), timeout=20)
            return [value] * len(prompts)

        return reward

    return [member(float(i)) for i in range(parties)]


class _Barrier:
    """asyncio.Barrier came with Python 3.11."""

    def __init__(self, parties):
        self.parties, self.event = parties, asyncio.Event()

    async def wait(self):
        self.parties -= 1
        if self.parties == 0:
            self.event.set()
        await self.event.wait()


def test_async_rewards_run_together():
    first, second, third = meeting(3)
    table = ask([first, Scaled(1.0), second, AsyncScaled(2.0), third])
    mean = VIDEOS.mean(dim=(1, 2, 3, 4))
    assert [table.values[:, i].tolist() for i in (0, 2, 4)] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    torch.testing.assert_close(table.values[:, 3], 2 * mean)
    assert set(table.seconds) == set(RewardPanel([first, Scaled(1.0), second, AsyncScaled(2.0), third]).names)


def test_async_rewards_inside_a_running_loop():
    """A notebook has a running event loop; asyncio.run alone refuses to start there."""

    async def notebook():
        return ask(meeting(2))

    assert asyncio.run(notebook()).values.tolist() == [[0.0, 1.0]] * 3


def test_async_rewards_begin_before_the_others_run():
    """A synchronous reward that waits for a coroutine of the same call would wait for ever otherwise."""
    begun, go = threading.Event(), threading.Event()

    def waits(prompts):
        assert begun.wait(20)
        go.set()
        return [1.0] * len(prompts)

    async def begins(prompts, log_extra):
        log_extra("said", list(prompts))
        begun.set()
        while not go.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        return [2.0] * len(prompts)

    table = ask([waits, begins, Scaled(1.0)])
    assert table.values[:, :2].tolist() == [[1.0, 2.0]] * 3 and table.extras == {"said": PROMPTS}
    assert list(table.seconds) == ["waits", "begins", "Scaled"] and table.seconds["begins"] >= 0.05
    assert table.recorded_by == {"said": "begins"}


def test_an_error_of_another_reward_cancels_a_coroutine():
    cancelled, begun = threading.Event(), threading.Event()

    async def long(prompts):
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def fails(prompts):
        assert begun.wait(20)
        raise ZeroDivisionError("nothing there")

    with pytest.raises(RewardError, match="'fails' raised ZeroDivisionError"):
        ask([fails, long])
    assert cancelled.wait(20)


# --- what rewards record ---


def test_extras_and_metrics():
    def reward(prompts, videos, log_extra, log_metric):
        log_extra("list", [1, "a", None])
        log_extra("tensor", torch.tensor([1.0, 2.0, 3.0]))
        log_extra("array", np.array([1, 2, 3], dtype=np.float32))
        log_extra("scalars", [np.float32(1), torch.tensor(2.0), 3])
        log_metric("cost", torch.tensor(2.0))
        log_metric("cost", 4)
        return [0.0] * 3

    table = ask(reward)
    assert table.extras["list"] == [1, "a", None]
    for name in ("tensor", "array", "scalars"):
        assert table.extras[name] == [1.0, 2.0, 3.0] and all(isinstance(v, (int, float)) for v in table.extras[name])
    assert table.metrics == {"cost": [2.0, 4.0]}


def test_extras_of_the_wrong_length_are_refused():
    def reward(prompts, log_extra):
        log_extra("x", [1])
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"log_extra\('x'\) got 1 values for 3 samples"):
        ask(reward)
