"""The other processes of a run: one that is gone or stuck is named, and so is one with other weights."""

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

ROLL_CALL = 20  # seconds that the others have to answer once a collective has failed
EXIT_LIMIT = 10.0  # seconds that gloo's threads have to come to rest before the process ends
_TASKS = Path("/proc/self/task")  # Linux: a folder for each thread of this process
_PEER_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport|NCCL (error|communicator)|Broken pipe")
_GOES_ON = "Checkpoints are written whole: mend what stopped that rank, and resume with resume_from_checkpoint=True."


class RankError(RuntimeError):
    """A process of the run is gone, stuck, or holds other weights than the rest."""


class Ranks:
    """What the processes of a run know of each other.

    They meet through gloo on the CPU, in a group beside that of the collectives: a collective that waits for a lost
    rank says nothing until it is timed out, and then not for whom it waited.

    Args:
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
                f"rank {accelerator.process_index} cannot reach the others through gloo ({error}). Set "
                "GLOO_SOCKET_IFNAME to the network interface that the machines share, for instance eth0."
            ) from error

    def meet(self, where: str, timeout: float | None = None) -> None:
        """Wait for all ranks, before a collective that would wait without saying for whom.

        Raises:
            RankError: a rank did not come in time, or is gone. Every rank names one that is gone; one that is stuck is
                named by rank 0, and the others say that rank 0 did not answer.
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
                    f"rank 0 did not answer rank {rank}: it is stuck, or waits for another rank, which its own "
                    "message names; it had been waited for"
                )
            raise RankError(f"{who} {where}, for at most {seconds:g} s (ddp_timeout). {_GOES_ON}") from error

    def _closed(self) -> set[int]:
        """The ranks whose connection is closed: nothing can be sent to them."""
        closed = set()
        for other in set(range(self.accelerator.num_processes)) - {self.accelerator.process_index}:
            try:
                isend(torch.zeros(1), group_dst=other, group=self.group)
            except RuntimeError:
                closed.add(other)
        return closed

    def explain(self, error: RuntimeError, where: str) -> None:
        """After a collective has failed: who does not answer any more? A RankError names them."""
        if self.group is not None and _PEER_LOST.search(str(error)) and not isinstance(error, RankError):
            self.meet(f"{where}, where a collective failed", min(self.timeout, ROLL_CALL))

    def check_equal(self, weights: Iterable[Tensor]) -> None:
        """A RankError that names the ranks whose weights differ from rank 0's in any bit."""
        if self.group is None:
            return
        digests = self.accelerator.gather(digest(weights).view(1)).tolist()
        different = [rank for rank, own in enumerate(digests) if own != digests[0]]
        if different:
            raise RankError(
                f"ranks {different} hold other adapter weights than rank 0: gradients were not shared, or a device "
                "computes wrongly. Resume from a checkpoint of before that with resume_from_checkpoint."
            )


def digest(weights: Iterable[Tensor]) -> Tensor:
    """sum_i (2 i + 1) b_i mod 2^64 over the bits b_i of all fp32 values, on their device; any one change shows."""
    total, start = 0, 0
    for weight in weights:
        bits = weight.detach().float().contiguous().view(torch.int32).flatten().long()
        places = torch.arange(start, start + len(bits), device=bits.device)
        total = total + (bits * (2 * places + 1)).sum()
        start += len(bits)
    return total


@atexit.register
def let_gloo_rest(limit: float = EXIT_LIMIT) -> None:
    """Wait, for at most `limit` seconds, until every worker thread of gloo sleeps. Called when the interpreter exits.

    A worker lets go of a collective's tensors a moment after those who waited for the collective go on, and needs the
    interpreter for that. Should the interpreter be gone by then, Python 3.11 to 3.13 ends the thread inside a C++
    destructor, and the process dies of SIGABRT ("terminate called without an active exception"). destroy_process_group
    ends the workers only where nobody else, for instance a DeviceMesh, knows the group.
    """
    if not _TASKS.is_dir():
        time.sleep(0.1)
        return
    end, before = time.monotonic() + limit, None
    while (workers := _gloo_workers()) and time.monotonic() < end:
        if workers == before and all(state == "S" for state, _ in workers.values()):
            return  # one that waited for the interpreter would have had it meanwhile
        before = workers
        time.sleep(0.02)


def _gloo_workers() -> dict[str, tuple[str, str]]:
    """State and number of context switches of each worker thread of gloo."""
    workers = {}
    for task in _TASKS.iterdir():
        try:
            if (task / "comm").read_text(encoding="utf-8") == "pt_gloo_runloop\n":
                status = (task / "status").read_text(encoding="utf-8")
                workers[task.name] = re.search(r"State:\s+(\w)", status)[1], status.partition("voluntary")[2]
        except OSError:  # it has ended
            continue
    return workers
