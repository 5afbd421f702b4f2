"""Two real processes (torchrun, gloo, CPU) equal one."""

import json
import subprocess
from pathlib import Path

import pytest
import scenarios
from comparisons import (
    assert_equal_ranks,
    assert_equal_rewards_move_nothing,
    assert_equals_one,
    assert_evaluated_as_one,
    assert_resumed,
    numbers,
)
from processes import torchrun

EQUAL_ONE = ["whole_groups", "overlapped", "idle_rank", "distilled", "nft", "flash_grpo"]
SLOW = [
    "split_group",
    "backpropagated",
    "accumulated",
    "backpropagated_k2",
    "full",  # the first two: test_sharded.py
    "flow_dppo",
    "awm",
    "rvm",
    "flow_dpo",
    "flow_dpo_pairs",
]
SHARED = ["whole_groups"]
TOGETHER = [
    *EQUAL_ONE,
    "resumed",
    "evaluated",
    *(f"shared/{name}" for name in SHARED),
    "disturbed_weights",
    "unequal_weights",
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """All scenarios in one launch; the last of them ends it with an error."""
    folder = tmp_path_factory.mktemp("two")
    return folder, torchrun(scenarios.__file__, folder, *TOGETHER, "failing_rank", timeout=400)


@pytest.fixture(scope="module")
def two(launched) -> Path:
    folder, result = launched
    assert (folder / f"{TOGETHER[-1]}_1.json").exists(), result.stdout[-5000:]
    return folder


@pytest.mark.parametrize("name", [*EQUAL_ONE, "resumed", "evaluated"])
def test_ranks_hold_equal_weights(two, name):
    assert_equal_ranks(two, name)


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_two_processes_equal_one(two, name):
    """The same videos are drawn, and the gradient is that of the gathered batch."""
    assert_equals_one(two, name, scenarios.METRICS)


@pytest.mark.slow
def test_more_scenarios(tmp_path):
    result = torchrun(scenarios.__file__, tmp_path, *SLOW, "no_spread", timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_equal_ranks(tmp_path, "no_spread")
    assert_equal_rewards_move_nothing(tmp_path)
    for name in SLOW:
        assert_equal_ranks(tmp_path, name)
        assert_equals_one(tmp_path, name, scenarios.METRICS)


@pytest.mark.parametrize("name", SHARED)
def test_processes_that_share_each_video_equal_one(two, name):
    """More of them in test_shared_tokens.py."""
    assert_equal_ranks(two / "shared", name)
    assert_equals_one(two / "shared", name)


def test_each_process_writes_its_trace_and_logs_are_their_mean(two):
    sums = []
    for rank in (0, 1):
        events = json.loads((two / f"overlapped_2/trace_rank{rank}.json").read_text())["traceEvents"]
        spans = [event for event in events if event["ph"] == "X"]
        assert {event["pid"] for event in spans} == {rank}
        rollouts = [event for event in spans if event["name"] == "rollout"]
        rewards = [event for event in spans if event["name"] == "rewards/brightness"]
        assert len(rollouts) == 2 and len(rewards) == 4 and rewards[0]["tid"] != rollouts[0]["tid"]
        assert rollouts[0]["ts"] < rewards[0]["ts"] < rollouts[0]["ts"] + rollouts[0]["dur"]
        result = numbers(two, "overlapped", rank)
        assert result["own_steps"] == 3
        sums.append(sum(value for name, value in result["own"].items() if not name.startswith("beside/")))
    logged = numbers(two, "overlapped")["parts"]
    assert 0.8 * sum(sums) / 2 < logged <= sum(sums) / 2 + 1e-6


def test_resumed_equals_uninterrupted(two):
    assert_resumed(two)
    assert numbers(two, "resumed")["files"] == ["checkpoint-2"]
    (folder,) = two.glob("resumed_2/broken/checkpoint-2")
    assert {p.name for p in folder.glob("random_*.json")} == {"random_0.json", "random_1.json"}


def test_evaluation_equals_that_of_one_process(two):
    assert_evaluated_as_one(two)


def test_unequal_weights_are_found(two):
    assert "ranks [1] hold different weights from rank 0" in numbers(two, "unequal_weights")["message"]


def test_a_changed_bit_is_found_at_the_next_comparison(two):
    for rank in (0, 1):
        result = numbers(two, "disturbed_weights", rank)
        assert "ranks [1] hold different weights from rank 0" in result["message"] and result["step"] == 3


def test_a_reward_that_fails_on_one_rank_ends_the_run(two, launched):
    _, result = launched
    assert result.returncode != 0
    assert "reward 'fails' raised RuntimeError: the server of this rank is gone" in result.stdout
    assert not list(two.glob("failing_rank_*.json"))
