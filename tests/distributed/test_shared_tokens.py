"""Two real processes that share the tokens of each video (context parallelism) equal one process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import scenarios
from processes import accelerate, run
from tiny_runs import largest_difference

EQUAL_ONE = ["whole_groups", "accumulated", "backpropagated", "backpropagated_k2", "distilled", "unlike_rewards"]


def numbers(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


def equals_one(folder: Path, tmp_path: Path, name: str) -> None:
    one = scenarios.run(name, tmp_path)
    first, second = (load_file(folder / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert largest_difference(first, second) == 0
    assert largest_difference(one["weights"], first) < 1e-6
    start = scenarios.tiny_runs.weights(scenarios.made(tmp_path / "start"))
    assert largest_difference(one["weights"], start) > 1e-4


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARE_TOKENS", "1")
        result = run("torch.distributed.run", "--standalone", "--nproc_per_node", "2", scenarios.__file__,
                     str(folder), *EQUAL_ONE, "resumed", "evaluated", "refused_splits", timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    return folder


@pytest.mark.parametrize("name", EQUAL_ONE)
def test_processes_that_share_videos_equal_one(shared, tmp_path, name):
    equals_one(shared, tmp_path, name)


def test_such_a_run_resumes(shared):
    for rank in (0, 1):
        result = numbers(shared, "resumed", rank)
        assert result["difference"] == 0 and result["rewards"][0] == result["rewards"][1]


def test_each_video_is_evaluated_once(shared, tmp_path):
    one = scenarios.run("evaluated", tmp_path)
    for rank in (0, 1):
        result = numbers(shared, "evaluated", rank)
        for key, value in one["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=1e-5), key
        for name in ("five", "one"):
            assert result["scores"][name]["scores"]["number"] == one["scores"][name]["scores"]["number"]
    assert (shared / "evaluated_2" / "samples" / "before_after_five.png").exists()


def test_what_cannot_be_split_is_said(shared):
    without_plan, three_tokens = numbers(shared, "refused_splits")["messages"]
    assert "context_parallel=2: diffusers has no plan (_cp_plan) to split the tokens of CogVideoX" in without_plan
    assert "context_parallel: the tokens of a video cannot be divided" in three_tokens


def test_tokens_and_weights_in_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARE_TOKENS", "1")
    result = accelerate(scenarios.__file__, tmp_path, "accumulated", timeout=100)
    assert result.returncode == 0, result.stdout[-5000:]
    equals_one(tmp_path, tmp_path / "one", "accumulated")
