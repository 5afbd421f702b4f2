"""Two real processes (the launcher files, gloo, CPU) with DeepSpeed's ZeRO-2 and ZeRO-3 equal one process without."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import scenarios
from comparisons import assert_equal_rewards_move_nothing, one_process
from processes import launch
from tiny_runs import largest_difference

# Not imported, which takes seconds: the processes do it.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")]
ROOT = Path(__file__).parents[2]
EQUAL_ONE = [
    "whole_groups",
    "split_group",
    "accumulated",
    "idle_rank",
    "clipped",
    "backpropagated",
    "backpropagated_k2",
    "distilled",
    "two_experts",
    "trained_twice",
    "half_precision",
    "compiled",
]
STAGES = [2, 3]
FULL = ["full", "full_resumed"]  # ZeRO-3 partitions frozen weights only
BESIDES = ["resumed", "evaluated", "parts_of_weights", "stopped", "resumed_elsewhere", "unequal_weights", "no_spread"]


def numbers(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


def two_processes(folder: Path, stage: int, *names: str, timeout: float):
    file = ROOT / "recipes" / "accelerate" / f"deepspeed_zero{stage}.yaml"
    return launch(
        file,
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        scenarios.__file__,
        str(folder),
        *names,
        timeout=timeout,
    )


class Runs:
    """The results of two processes by stage, each made once."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, {}

    def two(self, stage: int) -> Path:
        if stage not in self.made:
            folder = self.made[stage] = self.folder / str(stage)
            folder.mkdir()
            one = scenarios.trained(
                scenarios.made(folder / "stopped_1", callbacks=[scenarios.tiny_runs.StopAt(2)], **scenarios.ADAMW)
            )
            assert one["weights"]
            names = EQUAL_ONE + BESIDES + (["unequal_texts", "freed_behind_backward"] if stage == 3 else FULL)
            result = two_processes(folder, stage, *names, timeout=580)
            assert result.returncode == 0, result.stdout[-5000:]
        return self.made[stage]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("name", EQUAL_ONE)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(runs, stage, name):
    one, folder = one_process(name), runs.two(stage)
    first, second = (load_file(folder / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(first, second) == 0
    assert largest_difference(one["weights"], first) < (1e-6 if name != "half_precision" else 1e-3)
    for key in scenarios.METRICS:
        if name != "half_precision":
            assert numbers(folder, name)[key] == pytest.approx(one[key], rel=1e-3, abs=2e-5), key
    if name == "two_experts":
        for own, expected in zip(numbers(folder, name)["norms"], one["norms"], strict=True):
            assert own == pytest.approx(expected, rel=1e-4) and min(own) > 0
    if name == "clipped":
        assert min(numbers(folder, name)["grad_norm"]) > 2e-3


def test_all_weights_train_as_in_one_process(runs):
    """With ZeRO-2; resumed to the bit."""
    one, folder = one_process("full"), runs.two(2)
    for name in FULL:
        first, second = (load_file(folder / f"{name}_{rank}.safetensors") for rank in (0, 1))
        assert largest_difference(first, second) == 0
    assert largest_difference(one["weights"], load_file(folder / "full_0.safetensors")) < 1e-6
    assert numbers(folder, "full_resumed")["difference"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_each_process_holds_half(runs, stage):
    """Of the optimizer's states, and with ZeRO-3 of the frozen weights."""
    both = [numbers(runs.two(stage), "parts_of_weights", rank) for rank in (0, 1)]
    for own in both:
        assert own["states"] == pytest.approx(own["trained"], rel=0.05)  # AdamW has two for each number
        share = 1 if stage == 2 else 2
        assert own["held"] == pytest.approx(own["whole"] / share, rel=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_equal_rewards_move_nothing(runs, stage):
    assert_equal_rewards_move_nothing(runs.two(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes(runs, stage):
    for rank in (0, 1):
        result = numbers(runs.two(stage), "resumed", rank)
        assert result["difference"] == 0 and result["rewards"][0] == result["rewards"][1]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_of_one_process_and_of_two_mean_the_same(runs, stage):
    """Two processes resume what one saved, and one what two saved; AdamW amplifies small gradients."""
    folder = runs.two(stage)
    here, there = scenarios.run("resumed_elsewhere", folder), numbers(folder, "resumed_elsewhere", 1)
    assert here["same"] == there["same"] == [True, True]
    assert max(here["difference"], there["difference"]) < 1e-3
    assert largest_difference(here["weights"], load_file(folder / "resumed_elsewhere_1.safetensors")) < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_equals_that_of_one_process_and_the_adapter_reloads(runs, stage):
    one, folder = one_process("evaluated"), runs.two(stage)
    for rank in (0, 1):
        result = numbers(folder, "evaluated", rank)
        for key, value in one["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=1e-5), key
    saved = folder / "evaluated_2"
    pipe = scenarios.tiny_runs.pipeline()
    pipe.load_lora_weights(saved)  # whole, by plain diffusers
    loaded = {
        f"transformer.{n.replace('default_0', 'default')}": p.detach()
        for n, p in pipe.transformer.named_parameters()
        if "lora_" in n
    }
    assert largest_difference(loaded, load_file(folder / "evaluated_0.safetensors")) == 0
    assert (saved / "samples" / "before_after_five.png").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_with_other_weights_is_named(runs, stage):
    for rank in (0, 1):
        assert "ranks [1] hold different weights" in numbers(runs.two(stage), "unequal_weights", rank)["message"]


def test_processes_with_texts_of_unequal_lengths_make_the_same_calls(runs):
    for rank in (0, 1):
        result = numbers(runs.two(3), "unequal_texts", rank)
        assert result["videos"] < 1e-4 and result["log_probs"] < 1e-4


def test_backward_frees_behind_itself(runs):
    """One of eight blocks, whose input has no gradient, and what is outside of them."""
    assert 0 < numbers(runs.two(3), "freed_behind_backward")["whole"] < 0.3


@pytest.mark.parametrize("stage", STAGES)
def test_with_context_parallelism(runs, tmp_path, stage):
    result = two_processes(tmp_path, stage, "shared/split_group", timeout=200)
    assert result.returncode == 0, result.stdout[-5000:]
    ours = load_file(tmp_path / "shared" / "split_group_0.safetensors")
    assert largest_difference(one_process("split_group")["weights"], ours) < 1e-6
