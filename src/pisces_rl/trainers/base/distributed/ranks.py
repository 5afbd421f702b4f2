"""Find and name ranks that are gone, stuck, or hold different weights."""

import atexit
import re
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import isend, monitored_barrier, new_group

ROLL_CALL = 20  # seconds that the other ranks have to answer after a collective failed
EXIT_LIMIT = 10.0  # seconds to wait at exit for gloo's threads to become idle
_TASKS = Path("/proc/self/task")  # Linux: one folder per thread of this process
_PEER_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|NCCL (error|communicator)|Broken pipe")
_RESUME = "Checkpoints are complete: fix what stopped that rank, and resume with resume_from_checkpoint=True."


class RankError(RuntimeError):
    """A process of the run is gone, stuck, or holds different weights."""


class Ranks:
    """Barriers and checks between the processes of a run.

    They use a separate gloo group on the CPU, because a collective that waits for a lost rank is silent until its
    timeout, and even then does not say which rank is missing.

    Args:
        accelerator: the trainer's accelerator.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.accelerator, self.timeout, self.group = accelerator, timeout, None
        if accelerator.num_processes == 1:
            return
        try:
            self.group = new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        except RuntimeError as error:
            raise RankError(
                f"rank {accelerator.process_index} cannot reach the other ranks through gloo ({error}). Set "
                "GLOO_SOCKET_IFNAME to the network interface that connects the machines, for instance eth0."
            ) from error

    def meet(self, where: str, timeout: float | None = None) -> None:
        """Wait for all ranks before a collective, so that a missing rank can be named.

        Args:
            where: what the ranks meet for, for the error message ("to average gradients ...").
            timeout: seconds to wait; None: the timeout of this object.

        Raises:
            RankError: a rank is gone or did not arrive in time. Every rank names a rank that is gone. Only rank 0
                names a rank that is stuck; the others report that rank 0 did not answer.
        """
        if self.group is None:
            return
        seconds, rank = timeout or self.timeout, self.accelerator.process_index
        try:
            monitored_barrier(self.group, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            late = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            missing = {int(number) for number in re.findall(r"\d+", late[1])} if late else set()
            if not late and "Timed out" not in str(error):  # gloo closes all connections of a rank that timed out
                missing = self._closed()
            if missing:
                who = f"rank {', '.join(map(str, sorted(missing)))} is gone or stuck: rank {rank} waited for it"
            else:
                who = (
                    f"rank 0 did not answer rank {rank}: it is stuck, or it waits for another rank, which its "
                    f"message names; rank {rank} waited for it"
                )
            raise RankError(f"{who} {where}, for at most {seconds:g} s (ddp_timeout). {_RESUME}") from error

    def _closed(self) -> set[int]:
        """Return the ranks whose connection is closed, so that nothing can be sent to them."""
        closed = set()
        for other in set(range(self.accelerator.num_processes)) - {self.accelerator.process_index}:
            try:
                isend(torch.zeros(1), group_dst=other, group=self.group)
            except RuntimeError:
                closed.add(other)
        return closed

    def explain(self, error: RuntimeError, where: str) -> None:
        """After a failed collective, raise a RankError that names the ranks that no longer answer, if any."""
        if self.group is not None and _PEER_LOST.search(str(error)) and not isinstance(error, RankError):
            self.meet(f"{where}, where a collective failed", min(self.timeout, ROLL_CALL))

    def check_equal(self, weights: Iterable[Tensor]) -> None:
        """Raise a RankError that names the ranks whose weights differ from rank 0's in any bit."""
        if self.group is None:
            return
        digests = self.accelerator.gather(digest(weights).view(1)).tolist()
        different = [rank for rank, own in enumerate(digests) if own != digests[0]]
        if different:
            raise RankError(
                f"ranks {different} hold different weights from rank 0: gradients were not averaged, or a device "
                "computes wrong results. Resume from an earlier checkpoint with resume_from_checkpoint."
            )


def digest(weights: Iterable[Tensor]) -> Tensor:
    """Return sum_i (2 i + 1) b_i mod 2^64 over the 32-bit patterns b_i of all values in fp32, on their device.

    Any single changed value changes the sum.
    """
    total, start = 0, 0
    for weight in weights:
        bits = weight.detach().float().contiguous().view(torch.int32).flatten().long()
        places = torch.arange(start, start + len(bits), device=bits.device)
        total = total + (bits * (2 * places + 1)).sum()
        start += len(bits)
    return total


@atexit.register
def let_gloo_rest(limit: float = EXIT_LIMIT) -> None:
    """Wait at interpreter exit until all worker threads of gloo sleep, for at most `limit` seconds.

    A worker frees the tensors of a collective shortly after the collective returns, and needs the interpreter for it.
    If the interpreter has already shut down, Python 3.11 to 3.13 ends the thread inside a C++ destructor, and the
    process dies of SIGABRT ("terminate called without an active exception"). destroy_process_group does not help if
    another object, for instance a DeviceMesh, still holds the group, because the workers then keep running.
    """
    if not _TASKS.is_dir():
        time.sleep(0.1)
        return
    end, before = time.monotonic() + limit, None
    while (workers := _gloo_workers()) and time.monotonic() < end:
        if workers == before and all(state == "S" for state, _ in workers.values()):
            return  # no worker ran since the last look, so none is waiting for the interpreter
        before = workers
        time.sleep(0.02)


def _gloo_workers() -> dict[str, tuple[str, str]]:
    """Return the state and the context switches of each gloo worker thread."""
    workers = {}
    for task in _TASKS.iterdir():
        try:
            if (task / "comm").read_text(encoding="utf-8") == "pt_gloo_runloop\n":
                status = (task / "status").read_text(encoding="utf-8")
                workers[task.name] = re.search(r"State:\s+(\w)", status)[1], status.partition("voluntary")[2]
        except OSError:  # the thread has ended
            continue
    return workers
