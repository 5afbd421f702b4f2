"""Two real processes (accelerate launch, gloo, CPU) with FSDP2 equal one process without."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import scenarios
from processes import accelerate
from tiny_runs import largest_difference

EQUAL_ONE = ["whole_groups", "split_group", "accumulated", "idle_rank", "backpropagated", "backpropagated_k2",
             "distilled", "compiled"]
TOGETHER = [*EQUAL_ONE, "resumed", "evaluated", "parts_of_weights", "unequal_texts", "half_precision"]


def numbers(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    result = accelerate(scenarios.__file__, folder, *TOGETHER, timeout=500)
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


def test_each_process_holds_about_half_of_the_weights(sharded):
    held = [numbers(sharded, "parts_of_weights", rank)["held"] for rank in (0, 1)]
    whole = numbers(sharded, "parts_of_weights")["whole"]
    assert sum(held) == whole and all(0.45 * whole < own < 0.55 * whole for own in held)
    assert not numbers(sharded, "parts_of_weights")["sharded_adapter"]


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_sharded_processes_equal_one(sharded, tmp_path, name):
    one = scenarios.run(name, tmp_path)
    first, second = (load_file(sharded / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(first, second) == 0
    assert largest_difference(one["weights"], first) < 1e-6
    start = scenarios.tiny_runs.weights(scenarios.made(tmp_path / "start"))
    assert largest_difference(one["weights"], start) > 1e-4
    for key in scenarios.METRICS:
        assert numbers(sharded, name)[key] == pytest.approx(one[key], rel=1e-3, abs=2e-5), key


def test_a_sharded_run_resumes(sharded):
    for rank in (0, 1):
        result = numbers(sharded, "resumed", rank)
        assert result["difference"] == 0 and result["rewards"][0] == result["rewards"][1]


def test_evaluation_of_few_prompts_equals_that_of_one_process(sharded, tmp_path):
    """Five prompts, and one: a process without a prompt of its own samples with the other, and scores nothing."""
    one = scenarios.run("evaluated", tmp_path)
    for rank in (0, 1):
        result = numbers(sharded, "evaluated", rank)
        for key, value in one["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=1e-5), key
        for name in ("five", "one"):
            assert result["scores"][name]["scores"]["number"] == one["scores"][name]["scores"]["number"]
    saved = sharded / "evaluated_2"
    assert (saved / "pytorch_lora_weights.safetensors").exists()
    assert (saved / "samples" / "before_after_five.png").exists()


def test_processes_with_texts_of_unequal_lengths_make_the_same_calls(sharded):
    for rank in (0, 1):
        result = numbers(sharded, "unequal_texts", rank)
        assert result["videos"] < 1e-4 and result["log_probs"] < 1e-4
        assert max(float(g.abs().max()) for g in load_file(sharded / f"unequal_texts_{rank}.safetensors").values()) > 0


def test_weights_of_two_dtypes_are_sharded(sharded):
    first, second = (load_file(sharded / f"half_precision_{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(first, second) == 0


def test_fsdp1_is_refused(tmp_path):
    result = accelerate(scenarios.__file__, tmp_path, "split_group", timeout=100, fsdp_version=1,
                        fsdp_reshard_after_forward="FULL_SHARD")  # fmt: skip
    assert result.returncode != 0
    assert "fsdp_version=1: FSDP1 flattens" in result.stdout and "--fsdp_version 2" in result.stdout


def test_gathered_weights_may_be_kept(tmp_path):
    result = accelerate(scenarios.__file__, tmp_path, "split_group", timeout=100, fsdp_reshard_after_forward=False)
    assert result.returncode == 0, result.stdout[-3000:]
    one = scenarios.run("split_group", tmp_path / "one")
    assert largest_difference(one["weights"], load_file(tmp_path / "split_group_0.safetensors")) < 1e-6
