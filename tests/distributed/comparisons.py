"""What several processes must have in common with one."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import scenarios
from safetensors.torch import load_file
from scenarios import tiny_runs


@functools.cache
def one_process(name: str) -> dict:
    """The result of a scenario on one process, computed once for all files that compare with it."""
    with tempfile.TemporaryDirectory() as folder:
        return scenarios.run(name, Path(folder))


@functools.cache
def start(full: bool = False) -> dict:
    """The weights that training starts from."""
    settings = {"peft_config": "full", "alive": False} if full else {}
    with tempfile.TemporaryDirectory() as folder:
        return tiny_runs.weights(scenarios.made(folder, **settings))


def numbers(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


def assert_equal_ranks(folder: Path, name: str) -> None:
    first, second = (load_file(folder / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert tiny_runs.largest_difference(first, second) == 0


def assert_equals_one(folder: Path, name: str, metrics=()) -> None:
    """The weights of a scenario, which moved, and its metrics."""
    one = one_process(name)
    assert tiny_runs.largest_difference(one["weights"], load_file(folder / f"{name}_0.safetensors")) < 1e-6
    assert tiny_runs.largest_difference(one["weights"], start(full=name == "full")) > 1e-4
    for key in metrics:
        assert numbers(folder, name)[key] == pytest.approx(one[key], rel=1e-3, abs=2e-5), key


def assert_equal_rewards_move_nothing(folder: Path, name: str = "no_spread") -> None:
    for rank in (0, 1):
        first, *further = numbers(folder, name, rank)["moved"]
        assert first > 0 and further == [0.0, 0.0]


def assert_resumed(folder: Path) -> None:
    for rank in (0, 1):
        result = numbers(folder, "resumed", rank)
        assert result["difference"] == 0 and result["rewards"][0] == result["rewards"][1]


def assert_evaluated_as_one(folder: Path) -> None:
    """Five prompts, then one, so that a process has none: scores in the dataset's order, and a run's files."""
    one = one_process("evaluated")
    for rank in (0, 1):
        result = numbers(folder, "evaluated", rank)
        assert result["metrics"].keys() == one["metrics"].keys()
        for key, value in one["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=1e-5), key
        for name, count in (("five", 5), ("one", 1)):
            ours, theirs = result["scores"][name], one["scores"][name]
            assert ours["prompts"] == theirs["prompts"] and len(ours["prompts"]) == count
            assert ours["scores"]["number"] == theirs["scores"]["number"]
            assert ours["scores"]["reward"] == pytest.approx(theirs["scores"]["reward"], rel=1e-5)
    run = folder / "evaluated_2"
    for file in ("pytorch_lora_weights.safetensors", "report.md", "samples/before_after_five.png"):
        assert (run / file).exists(), file
