"""Two real processes (torchrun, gloo, CPU) equal one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import scenarios
from processes import run
from tiny_runs import largest_difference

EQUAL_ONE = ["whole_groups", "split_group", "overlapped", "accumulated", "idle_rank", "backpropagated",
             "backpropagated_k2", "distilled"]
TOGETHER = [*EQUAL_ONE, "resumed", "evaluated", "disturbed_weights", "unequal_weights"]


def torchrun(folder: Path, *names: str, timeout: float) -> subprocess.CompletedProcess:
    return run("torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(scenarios.__file__)),
               str(folder), *names, timeout=timeout)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """All scenarios in one launch; the last of them ends it with an error."""
    folder = tmp_path_factory.mktemp("two")
    return folder, torchrun(folder, *TOGETHER, "failing_rank", timeout=400)


@pytest.fixture(scope="module")
def two(launched) -> Path:
    folder, result = launched
    assert (folder / f"{TOGETHER[-1]}_1.json").exists(), result.stdout[-5000:]
    return folder


def numbers(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


@pytest.mark.parametrize("name", [n for n in TOGETHER if n not in ("disturbed_weights", "unequal_weights")])
def test_ranks_hold_equal_weights(two, name):
    first, second = (load_file(two / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_two_processes_equal_one(two, tmp_path, name):
    """The same videos are drawn, and the gradient is that of the gathered batch."""
    one = scenarios.run(name, tmp_path)
    weights = load_file(two / f"{name}_0.safetensors")
    assert largest_difference(one["weights"], weights) < 1e-6
    start = scenarios.tiny_runs.weights(scenarios.made(tmp_path / "start"))
    assert largest_difference(one["weights"], start) > 1e-4
    for key in scenarios.METRICS:
        assert numbers(two, name)[key] == pytest.approx(one[key], rel=1e-3, abs=2e-5), key


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
    for rank in (0, 1):
        result = numbers(two, "resumed", rank)
        assert result["difference"] == 0 and result["rewards"][0] == result["rewards"][1]
    assert result["files"] == ["checkpoint-2"]
    (folder,) = two.glob("resumed_2/broken/checkpoint-2")
    assert {p.name for p in folder.glob("random_*.json")} == {"random_0.json", "random_1.json"}


def test_evaluation_equals_that_of_one_process(two, tmp_path):
    one = scenarios.run("evaluated", tmp_path)
    for rank in (0, 1):
        result = numbers(two, "evaluated", rank)
        assert result["metrics"].keys() == one["metrics"].keys()
        for key, value in one["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=1e-5), key
        for name, count in (("five", 5), ("one", 1)):
            ours, theirs = result["scores"][name], one["scores"][name]
            assert ours["prompts"] == theirs["prompts"] and len(ours["prompts"]) == count
            assert ours["scores"]["number"] == theirs["scores"]["number"]  # in the data set's order
            assert ours["scores"]["reward"] == pytest.approx(theirs["scores"]["reward"], rel=1e-5)
    run = two / "evaluated_2"
    assert (run / "pytorch_lora_weights.safetensors").exists() and (run / "report.md").exists()


def test_unequal_weights_are_found(two):
    assert "ranks [1] hold other adapter weights than rank 0" in numbers(two, "unequal_weights")["message"]


def test_a_changed_bit_is_found_at_the_next_comparison(two):
    for rank in (0, 1):
        result = numbers(two, "disturbed_weights", rank)
        assert "ranks [1] hold other adapter weights than rank 0" in result["message"] and result["step"] == 3


def test_a_reward_that_fails_on_one_rank_ends_the_run(two, launched):
    _, result = launched
    assert result.returncode != 0
    assert "reward 'fails' raised RuntimeError: the server of this rank is gone" in result.stdout
    assert not list(two.glob("failing_rank_*.json"))
