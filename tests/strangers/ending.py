"""Two forked ranks that end right after a collective, in three ways; prints exit codes as JSON.

python tests/strangers/ending.py FOLDER
"""

import datetime
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed

import pisces_rl.trainers  # noqa: F401 - as every process that trains has it

WAYS = ("ends", "raises", "is interrupted")


def collect_and_end(way: str, store: Path, rank: int) -> None:
    """gloo's worker has 2,000 tensors to free, and gets the interpreter only while this thread waits."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    kept.append(distributed.group.WORLD)  # as a DeviceMesh does, which DTensor never forgets
    sys.setswitchinterval(1000)
    distributed.all_reduce_coalesced([torch.ones(1) for _ in range(2000)])
    if way == "raises":
        raise RuntimeError("the reward's server is gone")
    if way == "is interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    distributed.destroy_process_group()


if __name__ == "__main__":
    kept, codes = [], {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    for way in WAYS:
        ranks = []
        for rank in (0, 1):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                collect_and_end(way, Path(sys.argv[1]) / way, rank)
                sys.exit()
        codes[way] = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    print(json.dumps(codes))
