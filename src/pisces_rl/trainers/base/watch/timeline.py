"""Measure where the time of a run goes: spans, parts that sum to the step time, and a Chrome trace."""

import contextlib
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from ....whole_files import write_json

IDLE = "idle"  # time outside all spans: data, logging, waiting for other processes
ORDER = ("text", "rollout", "sampling", "decode", "rewards", "update")
APART = ("evaluation", "saving")  # parts that are not in the step time
MOST_PENDING = 20_000  # read the marks when more than this many are unread


class HostClock:
    """Host time in seconds, for work that is finished when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def read(self, marks: list[float]) -> list[float]:
        return marks


class DeviceClock:
    """Time on the current CUDA stream, as events, so that nothing waits for the device until `read`.

    Because elapsed_time is in milliseconds as float32, each `read` counts from the last event of the previous one, to
    keep its precision.
    """

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.synchronize(device)
        self.origin, self.at = self.mark(), time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self, marks: list[torch.cuda.Event]) -> list[float]:
        """Wait for the events and return their times in seconds of perf_counter."""
        if not marks:
            return []
        for event in marks:
            event.synchronize()
        seconds = [self.at + self.origin.elapsed_time(event) / 1e3 for event in marks]
        self.origin, self.at = marks[-1], seconds[-1]
        return seconds


class _Lane:
    """Spans of one thread. A mark is [moment, part that starts there]; reading replaces the moment by seconds."""

    def __init__(self):
        self.stack: list[tuple[str, bool]] = []  # (name, whole)
        self.marks: list[list] = []  # marks since the last reading
        self.spans: list[tuple[str, list, list]] = []  # (name, start mark, end mark), for the trace
        self.totals: dict[str, float] = defaultdict(float)

    def switch(self, moment) -> list:
        """Count time from this moment for the top of the stack, or for the outermost whole span."""
        whole = next((name for name, whole in self.stack if whole), None)
        mark = [moment, whole or (self.stack[-1][0] if self.stack else IDLE)]
        self.marks.append(mark)
        return mark


class Timeline:
    """The timeline of one process.

    A span counts only its own time, without spans inside it, and time outside all spans is `idle`, so the parts of any
    interval sum to its length. A `whole` span also counts the spans inside it. On a CUDA device, time is that of the
    current stream, measured by events that are read once per log; otherwise it is host time. Spans of threads other
    than the one that called `start` are kept in a lane named after the thread and do not count as step time. Before
    `start` and after `stop`, spans are not recorded.

    Args:
        device: device of the work.
        rank: rank of the process.
        trace_steps: number of steps whose spans are all kept for `write_trace`; memory does not grow after them.
    """

    def __init__(self, device: torch.device, rank: int = 0, trace_steps: int = 0):
        self.device, self.rank, self.trace_steps = device, rank, trace_steps
        self.lock = threading.Lock()
        self.owner: int | None = None  # id of the thread whose time counts as step time
        self._clear()

    def start(self) -> None:
        """Reset, and count this thread's time as step time from now on."""
        self.clock = DeviceClock(self.device) if self.device.type == "cuda" else HostClock()
        self._clear()
        self.owner = threading.get_ident()
        self.main.switch(self.clock.mark())

    def _clear(self) -> None:
        self.main, self.beside, self.seen, self.steps = _Lane(), {}, {}, 0
        self.epoch = time.time() - time.perf_counter()

    def stop(self) -> None:
        self._settle()
        self.owner = None

    @contextlib.contextmanager
    def span(self, name: str, whole: bool = False) -> Iterator[None]:
        """Count the time inside as `name`; "rewards/bright" is a part of "rewards"."""
        if self.owner is None:
            yield
            return
        lane = self._lane()
        with self.lock:
            lane.stack.append((name, whole))
            start = lane.switch(self.clock.mark())
        try:
            yield
        finally:
            with self.lock:
                lane.stack.pop()
                end = lane.switch(self.clock.mark())
                if self.steps < self.trace_steps:
                    lane.spans.append((name, start, end))

    def step(self) -> None:
        """Count one optimizer step."""
        self.steps += 1
        if len(self.main.marks) > MOST_PENDING:
            self._settle()

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last `read`, with "rewards/NAME" included in "rewards".

        They sum to the time that has passed. The result is empty before `start` and after `stop`.
        """
        if self.owner is None:
            return {}
        self._settle()
        now, before = grouped(self.main.totals), self.seen
        self.seen = now
        return {part: seconds - before.get(part, 0.0) for part, seconds in now.items() if seconds != before.get(part)}

    def parts(self) -> dict[str, float]:
        """Return the seconds of each part since `start`, by full name; those of other threads as "beside/NAME"."""
        if self.owner is not None:
            self._settle()
        beside = {
            f"beside/{part}": seconds
            for lane in self.beside.values()
            for part, seconds in lane.totals.items()
            if part != IDLE
        }
        return dict(self.main.totals) | beside

    def write_trace(self, path: str | os.PathLike) -> None:
        """Write Chrome's trace event format, for chrome://tracing or Perfetto.

        Complete events, in microseconds since 1970, with the rank as pid and one tid per thread.
        """
        if self.owner is not None:
            self._settle()
        named = {"ph": "M", "pid": self.rank}
        events = [named | {"name": "process_name", "tid": 0, "args": {"name": f"rank {self.rank}"}}]
        for tid, (thread, lane) in enumerate({"": self.main, **self.beside}.items()):
            where = f"{self.device} {thread}".strip()
            events.append(named | {"name": "thread_name", "tid": tid, "args": {"name": where}})
            events += [
                {
                    "ph": "X",
                    "pid": self.rank,
                    "tid": tid,
                    "name": name,
                    "dur": (end - start) * 1e6,
                    "ts": (self.epoch + start) * 1e6,
                }
                for name, (start, _), (end, _) in lane.spans
            ]
        write_json(path, {"traceEvents": events, "displayTimeUnit": "ms"})

    def leave_trace(self, folder: str | os.PathLike) -> None:
        """Write trace_rankN.json, also after an interrupted run; if that fails, warn instead of ending the run."""
        path = Path(folder) / f"trace_rank{self.rank}.json"
        try:
            self.write_trace(path)
        except OSError as error:
            warnings.warn(f"{path} could not be written: {error}.", stacklevel=2)

    def _lane(self) -> _Lane:
        if threading.get_ident() == self.owner:
            return self.main
        with self.lock:
            return self.beside.setdefault(threading.current_thread().name, _Lane())

    def _settle(self) -> None:
        """Read the unread marks and add their times to the totals."""
        with self.lock:
            self.main.switch(self.clock.mark())
            lanes = [*self.beside.values(), self.main]  # the newest mark last
            unread = [mark for lane in lanes for mark in lane.marks if not isinstance(mark[0], float)]
            for mark, seconds in zip(unread, self.clock.read([moment for moment, _ in unread])):
                mark[0] = seconds
            for lane in lanes:
                for (begin, part), (end, _) in pairwise(lane.marks):
                    lane.totals[part] += end - begin
                del lane.marks[:-1]


def grouped(parts: dict[str, float]) -> dict[str, float]:
    """Sum the seconds of parts by the text before the first "/"."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in parts.items():
        sums[name.partition("/")[0]] += seconds
    return dict(sums)


def mean_parts(processes: list[dict[str, float]]) -> dict[str, float]:
    """Average `Timeline.parts` over processes."""
    names = dict.fromkeys(name for parts in processes for name in parts)
    return {name: sum(own.get(name, 0.0) for own in processes) / len(processes) for name in names}


def timeline_table(parts: dict[str, float], steps: int, title: str) -> Table:
    """Return a table of `Timeline.parts`: seconds per step and share of the step time.

    The shares of a step's parts sum to 100 %, and "rewards/NAME" is indented below "rewards". Below them are the
    seconds per step of other threads, and the total seconds of evaluation and saving.
    """
    inside = {name: value for name, value in parts.items() if not name.startswith("beside/") and name not in APART}
    total = sum(inside.values())
    table = Table(
        title=Text(title), title_justify="left", caption_justify="left", caption="idle: data, logging, other processes"
    )
    for column in ("part", "seconds per step", "share"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)

    def row(name: str, seconds: float) -> None:
        table.add_row(Text(name), f"{seconds / steps:.3f}", f"{100 * seconds / total:.1f} %")

    sums = grouped(inside)
    order = [*(name for name in ORDER if name in sums), *(n for n in sums if n not in (*ORDER, IDLE)), IDLE]
    for name in order:
        row(name, sums[name])
        for part in [part for part in inside if part.startswith(f"{name}/")]:
            row(f"  {part.partition('/')[2]}", inside[part])
    table.add_section()
    row("step", total)
    table.add_section()
    for name in [name for name in parts if name.startswith("beside/")]:
        table.add_row(Text(f"in parallel: {name.partition('/')[2]}"), f"{parts[name] / steps:.3f}", "")
    for name in [name for name in APART if name in parts]:
        table.add_row(f"outside the steps: {name}", f"{parts[name]:.3f} in total", "")
    return table


def print_timeline(timeline: Timeline, accelerator: Accelerator, console: Console) -> None:
    """Print the table of the mean over processes; all processes must call this, and the first prints."""
    parts = mean_parts(gather_object([timeline.parts()]))
    if accelerator.is_main_process and timeline.steps:
        on = f"{accelerator.num_processes} x {accelerator.device.type}"
        console.print(timeline_table(parts, timeline.steps, f"time line: mean of {timeline.steps} steps, {on}"))


class TimelineSteps(TrainerCallback):
    """Starts the timeline with training, counts its steps, and counts the optimizer's work as `update`."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline
        self.optimizing = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.optimizing.close()  # still open if an earlier run was interrupted inside the optimizer step
        self.timeline.start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizing.enter_context(self.timeline.span("update"))

    def on_step_end(self, args, state, control, **kwargs):
        self.optimizing.close()
        self.timeline.step()
