"""Starting processes that may hang: all of them are ended when time runs out, so that a hang is a failure."""

import os
import signal
import subprocess
import sys

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}


def run(module: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """`python -m module arguments`, with what it and its children print as stdout."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        raise AssertionError(f"{module} did not end within {timeout} s:\n{output[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)
