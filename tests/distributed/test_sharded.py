"""Two real processes (accelerate launch, gloo, CPU) with FSDP2 equal one process without."""

from pathlib import Path

import pytest
import scenarios
from comparisons import assert_equal_ranks, assert_equals_one, assert_evaluated_as_one, assert_resumed, numbers
from processes import accelerate
from safetensors.torch import load_file

EQUAL_ONE = ["split_group", "backpropagated"]
SLOW = ["whole_groups", "idle_rank", "distilled", "accumulated", "backpropagated_k2", "compiled"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    result = accelerate(scenarios.__file__, folder, *EQUAL_ONE, "parts_of_weights", "unequal_texts", timeout=500)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    result = accelerate(scenarios.__file__, folder, *SLOW, "resumed", "evaluated", "half_precision", timeout=500)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


def test_each_process_holds_about_half_of_the_weights(sharded):
    held = [numbers(sharded, "parts_of_weights", rank)["held"] for rank in (0, 1)]
    whole = numbers(sharded, "parts_of_weights")["whole"]
    assert sum(held) == whole and all(0.45 * whole < own < 0.55 * whole for own in held)
    assert not numbers(sharded, "parts_of_weights")["sharded_adapter"]


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_sharded_processes_equal_one(sharded, name):
    assert_equal_ranks(sharded, name)
    assert_equals_one(sharded, name, scenarios.METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_sharded_processes_equal_one(more, name):
    assert_equal_ranks(more, name)
    assert_equals_one(more, name, scenarios.METRICS)


@pytest.mark.slow
def test_a_sharded_run_resumes(more):
    assert_resumed(more)


@pytest.mark.slow
def test_evaluation_of_few_prompts_equals_that_of_one_process(more):
    """A process without a prompt of its own samples with the other, and scores nothing."""
    assert_evaluated_as_one(more)


def test_processes_with_texts_of_unequal_lengths_make_the_same_calls(sharded):
    for rank in (0, 1):
        result = numbers(sharded, "unequal_texts", rank)
        assert result["videos"] < 1e-4 and result["log_probs"] < 1e-4
        assert max(float(g.abs().max()) for g in load_file(sharded / f"unequal_texts_{rank}.safetensors").values()) > 0


@pytest.mark.slow
def test_weights_of_two_dtypes_are_sharded(more):
    assert_equal_ranks(more, "half_precision")


@pytest.mark.slow
def test_gathered_weights_may_be_kept(tmp_path):
    result = accelerate(scenarios.__file__, tmp_path, "split_group", timeout=300, fsdp_reshard_after_forward=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_equals_one(tmp_path, "split_group")


@pytest.mark.slow
def test_methods_with_sharded_weights_equal_one_process(tmp_path):
    """Also an old policy, an average and a reference; a process whose rewards are equal; a window for each prompt."""
    names = ["nft", "awm", "rvm", "flow_dpo", "flash_grpo_halves"]
    result = accelerate(scenarios.__file__, tmp_path, *names, timeout=500)
    assert result.returncode == 0, result.stdout[-5000:]
    for name in names:
        assert_equal_ranks(tmp_path, name)
        assert_equals_one(tmp_path, name, [m for m in scenarios.METRICS if name != "rvm" or "velocity" not in m])
