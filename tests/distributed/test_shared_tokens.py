"""Two real processes that share the tokens of each video (context parallelism) equal one process."""

from pathlib import Path

import pytest
import scenarios
from comparisons import assert_equal_ranks, assert_equals_one, assert_evaluated_as_one, assert_resumed, numbers
from processes import accelerate, torchrun

pytestmark = pytest.mark.slow
EQUAL_ONE = [
    "whole_groups",
    "accumulated",
    "backpropagated",
    "backpropagated_k2",
    "distilled",
    "unlike_rewards",
    "overlapped",
]
TOGETHER = [*EQUAL_ONE, "resumed", "evaluated", "refused_splits"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    result = torchrun(scenarios.__file__, folder, *(f"shared/{name}" for name in TOGETHER), timeout=300)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder / "shared"


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_processes_that_share_videos_equal_one(shared, name):
    assert_equal_ranks(shared, name)
    assert_equals_one(shared, name)


def test_such_a_run_resumes(shared):
    assert_resumed(shared)


def test_each_video_is_evaluated_once(shared):
    assert_evaluated_as_one(shared)


def test_what_cannot_be_split_is_said(shared):
    without_plan, three_tokens = numbers(shared, "refused_splits")["messages"]
    assert "context_parallel=2: diffusers has no plan (_cp_plan) to split tokens of CogVideoX" in without_plan
    assert "context_parallel: a video's tokens cannot be divided" in three_tokens


def test_tokens_and_weights_in_parts(tmp_path):
    result = accelerate(scenarios.__file__, tmp_path, "shared/accumulated", timeout=300)
    assert result.returncode == 0, result.stdout[-5000:]
    assert_equal_ranks(tmp_path / "shared", "accumulated")
    assert_equals_one(tmp_path / "shared", "accumulated")
