"""A user's type checker sees the package's annotations: right scripts pass, wrong ones do not."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed"),
]

RIGHT = """
import torch
from datasets import Dataset

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.export import export_adapter, merge_adapter
from pisces_rl.rewards import RewardPanel, load_reward


def brightness(prompts: list[str], videos: torch.Tensor, **columns: list) -> list[float]:
    return videos.mean(dim=(1, 2, 3, 4)).tolist()


async def length(prompts: list[str], videos: torch.Tensor, **columns: list) -> list[float | None]:
    return [float(len(prompt)) if prompt else None for prompt in prompts]


alignment = load_reward("ot_semantic", encoder="tiny-vtm", device="cpu")
panel = RewardPanel([brightness, length, alignment, "motion_amount"], timeout=60)
table = panel(["a red circle"], torch.rand(1, 5, 3, 64, 64), {})
mean: float = table.values.mean().item()

args = VideoGRPOConfig(output_dir="out", max_steps=2, num_generations=4, height=64, width=64, num_frames=17)
data = Dataset.from_dict({"prompt": ["a red circle", "two blue squares"]})
trainer = VideoGRPOTrainer("tiny-wan", [brightness, alignment], args, train_dataset=data, judge_funcs=length)
trainer.train()
beta: float = trainer.args.beta
scores: dict[str, float] = trainer.evaluate()
files = export_adapter("out", "exported", "comfyui", model="wan2.1")
merged = merge_adapter(trainer.pipeline, "out", "merged")
"""

WRONG = """
import torch

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.rewards import RewardPanel, load_reward


def words(prompts: list[str], videos: torch.Tensor, **columns: list) -> list[str]:
    return prompts


RewardPanel(words)  # expect: arg-type
args = VideoGRPOConfig(output_dir="out", num_generation=4)  # expect: call-arg
VideoGRPOTrainer("tiny-wan", words)  # expect: arg-type
VideoGRPOTrainer("tiny-wan", "motion_amount", dataset=None)  # expect: call-arg
VideoGRPOTrainer(7, "motion_amount")  # expect: arg-type
load_reward(7)  # expect: arg-type
"""


def test_a_users_script_is_checked_against_the_annotations(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports", "silent"]
    source = Path(__file__).resolve().parents[1] / "src"
    done = subprocess.run(
        [*command, "right.py", "wrong.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(source)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    lines = enumerate(WRONG.splitlines(), start=1)
    expected = [("wrong", str(number), line.split("expect: ")[1]) for number, line in lines if "expect: " in line]
    assert sorted(found) == sorted(expected), done.stdout + done.stderr
