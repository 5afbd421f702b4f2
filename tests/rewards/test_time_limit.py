"""A reward that does not return raises an error with its name; if it cannot be interrupted, the process ends."""

import asyncio
import io
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import tiny_runs

from pisces_rl.rewards import RewardPanel, time_limit
from pisces_rl.rewards.contract import RewardError

CALL = (["a", "b"], torch.zeros(2, 1, 3, 2, 2), {})


def slow(prompts, videos, **columns):
    time.sleep(30)
    return [0.0] * len(prompts)


async def slow_server(prompts, videos, **columns):
    await asyncio.sleep(30)
    return [0.0] * len(prompts)


async def quick_server(prompts, videos, **columns):
    await asyncio.sleep(0.01)
    return [1.0] * len(prompts)


@pytest.fixture(autouse=True, params=["foreground", "background"])
def shell(request):
    """A shell that starts a process in the background lets it ignore SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler if request.param == "foreground" else signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("reward", [slow, slow_server])
def test_a_slow_reward_is_named(reward, capfd):
    start = time.monotonic()
    with pytest.raises(RewardError, match=f"reward '{reward.__name__}' did not return within 0.2 s"):
        RewardPanel([quick_server, reward], timeout=0.2)(*CALL)
    assert time.monotonic() - start < 25
    if reward is slow:  # and where it was
        assert "time.sleep(30)" in capfd.readouterr().err


def test_a_reward_that_ends_while_it_is_being_interrupted(monkeypatch):
    """The message is still being written when the block ends; the interrupt comes afterwards."""

    class SlowTerminal(io.StringIO):
        def write(self, text):
            time.sleep(0.3)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", SlowTerminal())
    monkeypatch.setattr(time_limit, "GRACE", 0.5)
    with pytest.raises(RewardError, match="too late"):
        with time_limit.time_limit(0.1, "too late"):
            time.sleep(0.2)
    time.sleep(1.0)  # no process ends
    assert "cannot be interrupted" not in sys.stderr.getvalue()


def test_a_reward_in_time_is_left_alone():
    panel = RewardPanel([quick_server, lambda prompts, videos: [2.0, 3.0]], timeout=0.3)
    for _ in range(3):
        assert panel(*CALL).values.tolist() == [[1.0, 2.0], [1.0, 3.0]]
    time.sleep(0.5)  # no timer goes off later


def test_without_a_limit_a_reward_takes_its_time():
    assert RewardPanel(lambda prompts, videos: time.sleep(0.3) or [0.0, 1.0])(*CALL).values.tolist() == [[0.0], [1.0]]


def test_a_slow_differentiable_reward_is_named():
    with pytest.raises(RewardError, match="'slow' did not return"):
        RewardPanel(slow, timeout=0.2).with_gradients(*CALL)


def _stubborn():
    def deaf(prompts, videos):
        while True:
            try:
                time.sleep(30)
            except KeyboardInterrupt:
                pass

    time_limit.GRACE = 0.5
    RewardPanel(deaf, timeout=0.2)(*CALL)


def test_a_call_that_cannot_be_interrupted_ends_the_process():
    start = time.monotonic()
    assert tiny_runs.in_child(_stubborn, timeout=20) == 1
    assert time.monotonic() - start < 25


def test_ctrl_c_stays_ctrl_c():
    with pytest.raises(KeyboardInterrupt), time_limit.time_limit(30, "too slow"):
        raise KeyboardInterrupt
