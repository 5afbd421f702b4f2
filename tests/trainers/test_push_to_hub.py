"""`push_to_hub=True`, against a local stand-in for the Hub's API: a real run in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

from fake_hub import TOKEN, client_environment, running_hub

RUN = """
import sys
sys.path[:0] = [{tests!r}, {trainers!r}]
from tiny_runs import prompts, trainer

made = trainer({folder!r}, eval_dataset=prompts(2), push_to_hub=True, hub_model_id="me/mine", hub_token={token!r})
made.train()
made.save_model()
"""


def test_a_run_uploads_adapter_card_and_samples(tmp_path):
    here = Path(__file__).parent
    code = RUN.format(tests=str(here.parent), trainers=str(here), folder=str(tmp_path / "run"), token=TOKEN)
    with running_hub() as server:
        environment = client_environment(server, os.environ, tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
        )
    assert done.returncode == 0, done.stderr[-3000:]
    files = server.commits[-1]["files"]
    assert server.commits[-1]["repo"] == "me/mine"
    assert {"README.md", "pytorch_lora_weights.safetensors", "report.md"} <= set(files)
    assert any(name.endswith(".mp4") for name in files) and not any("checkpoint" in name for name in files)
    assert TOKEN not in files["README.md"].decode()
