"""Requests in line for the rewards of this process: scored in one thread, several in one call where they fit."""

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
    """The server stops before it has begun with a request."""


@dataclass(eq=False)
class _Job:
    panel: RewardPanel
    request: ScoreRequest
    future: Future = field(default_factory=Future)

    def fits(self, other: "_Job") -> bool:
        """Whether both may be scored in one call."""
        mine, theirs = self.request, other.request
        return (
            self.panel is other.panel
            and not compares_videos(self.panel.funcs[0])
            and mine.videos.shape[1:] == theirs.videos.shape[1:]
            and mine.columns.keys() == theirs.columns.keys()
            and mine.state == theirs.state
        )


class ScoringQueue:
    """One thread that scores what is put; rewards of a process share encoders, so they never run at the same time.

    Requests of one reward that wait together are scored in one call, up to `max_batch` videos, unless the reward
    compares videos; each gets its rows, and the metrics of the call. A single request is never split. Where such a
    call fails, each request is scored alone, so that an error is that of its own videos.

    Args:
        max_batch: videos of several requests in one call.
    """

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self.jobs: deque[_Job] = deque()
        self.changed, self.stopped = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self.thread.start()

    def put(self, panel: RewardPanel, request: ScoreRequest) -> Future:
        """The `ScoreAnswer` of the panel's one reward. A future that is cancelled before its turn is left out.

        The future raises RewardError of the reward, or `Stopping`.
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
        """Finish the call that runs; what waits gets `Stopping`."""
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
        """The first job, and those behind it that fit; none where the queue has stopped."""
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
        except BaseException as error:  # also a reward's sys.exit: the thread serves others
            failure = error if isinstance(error, RewardError) else RewardError(f"{type(error).__name__}: {error}")
        if failure is not None:
            if len(jobs) == 1:
                jobs[0].future.set_exception(failure)
                return
            del failure  # with the frames that hold the batch of all
            for job in jobs:
                self._score([job])
            return
        start = 0
        for job in jobs:
            own = table.rows(range(start, start := start + len(job.request.prompts)))
            values = [None if value != value else value for value in own.values[:, 0].tolist()]  # NaN does not apply
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
