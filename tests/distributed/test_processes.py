"""The launches of these tests must leave nothing behind."""

import os
import time

import psutil
import pytest
from processes import run


def test_a_timeout_also_ends_processes_in_other_sessions():
    """A rank that hangs, as torchrun starts it: it would keep the pipe open, and the test waiting."""
    seconds = f"61.{os.getpid()}"  # another run of these tests sleeps for another time
    rank = f"import subprocess; subprocess.run(['sleep', '{seconds}'], start_new_session=True)"
    before, start = psutil.Process().children(recursive=True), time.monotonic()  # wandb's server may be among them
    with pytest.raises(AssertionError, match="timeit did not end within 3 s"):
        run("timeit", "-n1", "-r1", rank, timeout=3)
    assert time.monotonic() - start < 50
    left = {*psutil.Process().children(recursive=True)} - {*before}
    assert not [child for child in left if child.status() != "zombie"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", seconds]]
