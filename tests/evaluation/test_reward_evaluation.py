"""Evaluating rewards: one that is right, one that knows nothing, one that sees its batch; and the script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pisces_rl.evaluation import CleanClips, evaluate_reward, plan_inside_objects
from pisces_rl.media import save_video
from pisces_rl.rewards import load_reward
from pisces_rl.shapemotion import SCENE_CORRUPTIONS, shapemotion_alignment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips():
    return CleanClips.shapemotion(n=40)


def test_the_verifier_ranks_what_it_verifies(clips):
    report = evaluate_reward(lambda prompts, videos: shapemotion_alignment(prompts=prompts, videos=videos), clips)
    for name in SCENE_CORRUPTIONS:
        if name in report.accuracy:
            assert report.accuracy[name].value > 0.95, name
    assert report.alignment == {} and report.milliseconds > 0
    assert "| wrong_color | 1 [1, 1] |" in str(report)


def test_a_constant_knows_nothing_and_a_batch_mean_is_caught(clips):
    constant = evaluate_reward(lambda prompts, videos: torch.zeros(len(prompts)), clips)
    assert {value.value for value in constant.accuracy.values()} == {0.5}
    assert set(constant.falls.values()) == {(0, 0, 0)} and constant.invariance == {"batch-mates": 0, "padding": 0}
    shared = evaluate_reward(lambda prompts, videos: videos.mean().expand(len(prompts)), clips)
    assert shared.invariance["batch-mates"] > 1e-4


def test_the_embedded_rewards(clips):
    report = evaluate_reward(load_reward("ot_quality"), clips)
    assert report.accuracy["wrong_color"].value > 0.9 and report.falls["uniform_noise"].value > 0.8
    assert max(report.invariance.values()) < 1e-5
    assert 0 < report.alignment["recall@10"].value <= 1 and "mutual-kNN (10)" in report.alignment
    shares = plan_inside_objects(load_reward("ot_semantic"), clips)
    assert set(shares) == {"plan", "attention", "fused", "tokens"} and 0 < shares["tokens"].value < 0.5
    with pytest.raises(ValueError, match="reward with plans"):
        plan_inside_objects(load_reward("matching"), clips)


def test_the_script_on_files(tmp_path):
    rows = []
    for i in range(3):
        video = torch.rand(17, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        save_video(video, tmp_path / f"{i}.mp4", min_size=32)
        rows.append({"video": f"{i}.mp4", "caption": ["a red circle", "a blue square", "two green crosses"][i]})
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "examples/evaluate_rewards.py", "--dataset", str(tmp_path / "clips.jsonl"), "--n", "3",
               "--rewards", "ot_semantic", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| another clip |" in (tmp_path / "out" / "rewards.md").read_text()
    assert (tmp_path / "out" / "plans.png").stat().st_size > 1000
    assert (tmp_path / "out" / "strength.png").stat().st_size > 1000
