"""Runs on several processes that were over, and then died of SIGABRT: "terminate called without an active exception".

Such cases come from issues of PyTorch (pytorch/pytorch 179291, 190489, 38228) and from a run of ours: a worker thread
of gloo asked for the interpreter when that was gone.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ranks_end_in_order_right_after_a_collective(tmp_path):
    """A script whose last line is a collective, one that fails there, and one that is stopped there by Ctrl-C."""
    script = Path(__file__).with_name("ending.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert "terminate called" not in result.stderr, result.stderr[-3000:]
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == {"ends": [0, 0], "raises": [1, 1], "is interrupted": [-signal.SIGINT] * 2}
    assert result.stderr.count("RuntimeError: the reward's server is gone") == 2
