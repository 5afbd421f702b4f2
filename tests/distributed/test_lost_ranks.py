"""A rank that dies, hangs in a reward or is stuck: the others end, name it, and the last checkpoint is whole."""

import functools
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import scenarios
import tiny_runs
from processes import together

pytestmark = pytest.mark.slow


@functools.cache
def uninterrupted() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return scenarios.trained(scenarios.made(folder, max_steps=3))["weights"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dead_rank", (["rank 1 is gone or stuck: rank 0 waited for it with the rewards of rollout 1"], [])),
        (
            "dead_in_a_collective",
            (
                ["rank 1 is gone or stuck: rank 0 waited for it after optimizer step 1, where a collective failed"],
                [],
            ),
        ),
        (
            "hanging_reward",
            (
                ["rank 1 is gone or stuck: rank 0 waited for it with the rewards of rollout 1"],
                [
                    "reward 'waits' did not return within 4 s (reward_timeout) on rank 1",
                    "threading.Event().wait()",
                    "RewardError",
                ],
            ),
        ),
        (
            "dead_server",
            (
                ["rank 1 is gone or stuck: rank 0 waited for it with the rewards of rollout 1"],
                [
                    "failed on rank 1 for 4 videos, the first of prompt",
                    "2 tries, the last: ConnectError",
                    "RewardError",
                ],
            ),
        ),
        ("stuck_rank", (["rank 1 is gone or stuck", "for at most 15 s (ddp_timeout)"], [])),
    ],
)
def test_the_others_end_and_name_it(tmp_path, name, said):
    start = time.monotonic()
    results = together(scenarios.__file__, str(tmp_path), name, timeout=200)
    assert time.monotonic() - start < 200  # and not ddp_timeout, where that is 400
    for result, sentences in zip(results, said):
        assert result.returncode != 0
        for sentence in sentences:
            assert sentence in result.stdout, result.stdout[-3000:]
    folder = tmp_path / f"{name}_2"
    assert tiny_runs.checkpoints(folder) == ["checkpoint-1"]
    resumed = scenarios.made(folder, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert tiny_runs.largest_difference(tiny_runs.weights(resumed), uninterrupted()) < 1e-6
