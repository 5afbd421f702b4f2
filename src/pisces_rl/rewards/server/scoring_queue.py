"""A queue of requests for the rewards of this process: one thread scores them, merging requests where possible."""

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from pisces_rl.rewards.contract import RewardError, compares_videos
from pisces_rl.rewards.panel import RewardPanel
from pisces_rl.rewards.table import RewardTable

from .wire import ScoreAnswer, ScoreRequest


class Stopping(Exception):
    """The server stopped before starting this request."""


@dataclass(eq=False)
class _Job:
    panel: RewardPanel
    request: ScoreRequest
    future: Future = field(default_factory=Future)

    def fits(self, other: "_Job") -> bool:
        """Return whether both may be scored in one call."""
        mine, theirs = self.request, other.request
        return (
            self.panel is other.panel
            and not compares_videos(self.panel.funcs[0])
            and mine.videos.shape[1:] == theirs.videos.shape[1:]
            and mine.columns.keys() == theirs.columns.keys()
            and mine.state == theirs.state
        )


class ScoringQueue:
    """One thread that scores all requests; rewards of a process share encoders, so they must not run concurrently.

    Waiting requests for the same reward are scored in one call, up to `max_batch` videos, unless the reward compares
    videos. Each request gets its rows, and the metrics of the whole call. A single request is never split. If a merged
    call fails, each request is scored alone, so that an error concerns only its videos.

    Args:
        max_batch: largest number of videos in a merged call.
    """

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self.jobs: deque[_Job] = deque()
        self.changed, self.stopped = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self.thread.start()

    def put(self, panel: RewardPanel, request: ScoreRequest) -> Future:
        """Queue a request and return a future of the `ScoreAnswer` of the panel's one reward. A future cancelled
        before its turn is skipped.

        The future raises the reward's RewardError, or `Stopping`.
        """
        job = _Job(panel, request)
        with self.changed:
            if self.stopped:
                job.future.set_exception(Stopping())
            else:
                self.jobs.append(job)
                self.changed.notify()
        return job.future

    def stop(self) -> None:
        """Let the running call finish; waiting requests get `Stopping`."""
        with self.changed:
            self.stopped = True
            for job in self.jobs:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(Stopping())
            self.jobs.clear()
            self.changed.notify()

    def _work(self) -> None:
        while jobs := self._next():
            self._score(jobs)

    def _next(self) -> list[_Job]:
        """Return the first job and those behind it that can be merged with it; none once the queue has stopped."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.jobs or self.stopped)
                if not self.jobs:
                    return []
                taken, left = [], []
                for job in self.jobs:
                    count = sum(len(other.request.prompts) for other in taken) + len(job.request.prompts)
                    if taken and not (count <= self.max_batch and taken[0].fits(job)):
                        left.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        taken.append(job)
                self.jobs = deque(left)
                if taken:
                    return taken

    def _score(self, jobs: list[_Job]) -> None:
        table = failure = None
        try:
            table = self._table(jobs[0].panel, [job.request for job in jobs])
        except BaseException as error:  # even sys.exit in a reward must not end the thread, which serves others
            failure = error if isinstance(error, RewardError) else RewardError(f"{type(error).__name__}: {error}")
        if failure is not None:
            if len(jobs) == 1:
                jobs[0].future.set_exception(failure)
                return
            del failure  # its traceback holds the merged batch
            for job in jobs:
                self._score([job])
            return
        start = 0
        for job in jobs:
            own = table.rows(range(start, start := start + len(job.request.prompts)))
            values = [None if value != value else value for value in own.values[:, 0].tolist()]  # NaN: does not apply
            job.future.set_result(ScoreAnswer(values, own.extras, own.metrics))

    def _table(self, panel: RewardPanel, requests: list[ScoreRequest]) -> RewardTable:
        state = requests[0].state
        videos = [request.videos for request in requests]
        columns = {
            name: [value for request in requests for value in request.columns[name]] for name in requests[0].columns
        }
        return panel(
            [prompt for request in requests for prompt in request.prompts],
            videos[0] if len(videos) == 1 else torch.cat(videos),
            columns,
            None if state is None else SimpleNamespace(**state),
        )
