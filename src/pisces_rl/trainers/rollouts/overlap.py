"""Score the videos of one part of a rollout while the next part is sampled."""

import threading
from collections.abc import Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from ...policy.fast.execution import attention_kernel
from ...rewards import RewardPanel, RewardTable, compares_videos
from ...rewards.thread_settings import with_settings_of_this_thread


class OverlappedRewards:
    """Scores the parts of a rollout in order, in a separate thread and, on a GPU, a separate CUDA stream.

        with overlapped:
            for part in parts:
                ...sample it...
                overlapped.submit(prompts, videos, columns, state)
            table = overlapped.table(all_prompts, all_videos, all_columns, state)

    Each reward is called once per part, except that one that `compares_videos` is called once for the whole rollout,
    in `table`. An exception in a reward is raised again by the next `submit` or by `table`. An interrupt does not wait
    for the reward that is running.

    Args:
        panel: the rewards.
        device: device of the videos.
        attention: the denoiser's attention kernel. Torch stores that choice per process, not per thread, so the
            kernel is set for the whole rollout; otherwise rewards would see it only while the denoiser runs.
    """

    def __init__(self, panel: RewardPanel, device: torch.device, attention: str | None = None):
        comparing = [i for i, func in enumerate(panel.funcs) if compares_videos(func)]
        self.places = [[i for i in range(len(panel)) if i not in comparing], comparing]
        self.each, self.together = (panel.only(places) for places in self.places)
        self.attention = attention
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "OverlappedRewards":
        self.queue, self.tables, self.error = SimpleQueue(), [], None
        self.stopped = threading.Event()
        self.kernel = attention_kernel(self.attention)
        self.kernel.__enter__()
        work = (
            self.queue,
            self.tables,
            self.stopped,
        )  # arguments: the thread of an interrupted rollout keeps its objects
        target = with_settings_of_this_thread(self._work)
        self.thread = threading.Thread(target=target, args=work, name="rewards", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stopped.set()
        self.queue.put(None)
        if kind is None or issubclass(kind, Exception):
            self.thread.join()
        self.kernel.__exit__(None, None, None)

    def submit(self, prompts: list[str], videos: Tensor, columns: dict[str, list], trainer_state=None) -> None:
        """Queue these videos for scoring, after those submitted before."""
        self._raise()
        ready = None
        if self.stream is not None:
            ready = torch.cuda.current_stream(videos.device).record_event()
        self.queue.put((ready, (prompts, videos, columns, trainer_state)))

    def table(
        self,
        prompts: list[str],
        videos: Tensor,
        columns: dict[str, list],
        trainer_state=None,
        places: Sequence[int] | None = None,
    ) -> RewardTable:
        """Wait until all parts are scored, and return the table of the whole rollout.

        Args:
            prompts: prompts of the whole rollout.
            videos: its videos.
            columns: its dataset columns.
            trainer_state: passed to the rewards.
            places: position of each video in the order of submission; None: the order is the same.
        """
        self.queue.put(None)
        self.thread.join()
        self._raise()
        if self.stream is not None:
            torch.cuda.current_stream(videos.device).wait_stream(self.stream)
        whole = RewardTable.stack(self.tables)
        if places is not None:
            whole = whole.rows(places)
        if not len(self.together):
            return whole
        return RewardTable.side_by_side([whole, self.together(prompts, videos, columns, trainer_state)], self.places)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self, queue: SimpleQueue, tables: list[RewardTable], stopped: threading.Event) -> None:
        try:
            while (job := queue.get()) is not None and not stopped.is_set():
                ready, inputs = job
                if self.stream is None:
                    tables.append(self.each(*inputs))
                    continue
                with torch.cuda.stream(self.stream):
                    self.stream.wait_event(ready)
                    inputs[1].record_stream(self.stream)
                    tables.append(self.each(*inputs))
        except BaseException as error:  # raised again in the sampling thread
            if not stopped.is_set():
                self.error = error
