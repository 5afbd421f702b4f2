"""Run evaluations and write their results: samples, comparison of before and after, event files."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from .... import media
from ....run_files import RunFiles
from ....whole_files import write_json
from ..setup.checks import check_best_metric
from ..watch.timeline import Timeline
from ..watch.trackers import log_samples, media_trackers
from .evaluation import Evaluator, means_of_sets
from .report import print_comparison, read_evaluation
from .run_folder import evaluation_file, first_evaluation, write_report, write_samples
from .run_page_files import RunPage


class RunReport:
    """The evaluations of a run and the files about them.

    Args:
        evaluator: samples and scores datasets.
        files: files of the run's folder.
        timeline: counts the seconds of evaluations.
        callbacks: the trainer's callbacks, including those of trackers; `RunPage` is added to them.
        main: whether this process writes files.
        args: a config.
        identity: identity of the run, see `run_identity`.

    Attributes:
        first: the first evaluation, {dataset: {"prompts", "scores"}}.
        last: the last evaluation, likewise.
        comparison: the comparison of both, after training.
        best_step: step of the best model, if it has replaced the last one.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        files: RunFiles,
        timeline: Timeline,
        callbacks: CallbackHandler,
        main: bool,
        args,
        identity: dict,
    ):
        self.evaluator, self.files, self.timeline, self.callbacks = evaluator, files, timeline, callbacks
        self.main, self.args = main, args
        scores = {"rewards": evaluator.rewards.names, "judges": evaluator.judges.names}
        self.page = RunPage(files, identity, scores)
        callbacks.add_callback(self.page)
        self.first: dict | None = None
        self.last: dict | None = None
        self.begin()

    def begin(self) -> None:
        """Reset the state at the beginning of a run."""
        self.comparison: dict | None = None
        self.best_step: int | None = None
        self.evaluated_at: int | None = None

    def saved_step(self, state: TrainerState) -> int:
        """Return the optimizer step of the current weights."""
        return state.global_step if self.best_step is None else self.best_step

    def evaluate(self, dataset, state: TrainerState, prefix: str, own: bool) -> dict[str, float]:
        """Sample and score a dataset, or {name: dataset}; return the metrics.

        Args:
            dataset: the dataset or datasets.
            state: the trainer's state.
            prefix: prefix of the metric names.
            own: whether this is the trainer's eval_dataset, whose results are kept.
        """
        sets = dataset if isinstance(dataset, dict) else {"eval": dataset}
        place, tag, step = *(("step", "eval") if own else ("other", "other")), self.saved_step(state)
        scored = {}
        for name, part in sets.items():
            with self.timeline.span("evaluation", whole=True):
                scored[name] = found = self.evaluator.evaluate(name, part, state)
                if found.videos is not None and self.main:
                    count = len(found.videos)
                    scores = {score: values[:count] for score, values in found.scores.items()}
                    self.write_samples(
                        f"samples/{place}_{step:06d}/{name}",
                        found.videos,
                        found.prompts[:count],
                        scores,
                        f"{tag}/{name}",
                        state.global_step,
                    )
        metrics = means_of_sets(scored, prefix, isinstance(dataset, dict))
        if own:
            check_best_metric(self.args.metric_for_best_model, prefix, metrics)
            self.evaluated_at = state.global_step
            self.last = {n: {"prompts": found.prompts, "scores": found.scores} for n, found in scored.items()}
            self.first = self.first or self.last
            if self.main:
                path = evaluation_file(step)
                self.files.claim(path)
                write_json(self.files.folder / path, {"step": step, "sets": self.last})
        return metrics

    def is_current(self, state: TrainerState) -> bool:
        """Return whether the last evaluation was done with the current weights."""
        return self.last is not None and (self.best_step is not None or self.evaluated_at == state.global_step)

    def take_best(self, checkpoint: str, step: int) -> None:
        """Make the evaluation of a checkpoint the last one, after its model was loaded as the best."""
        self.best_step, self.last = step, None
        if self.main:  # look beside the checkpoint, which is not in output_dir if the run was resumed from elsewhere
            path = Path(checkpoint).parent / evaluation_file(step)
            self.last = read_evaluation(path) if path.is_file() else None
        self.last = broadcast_object_list([self.last])[0]

    def compare(
        self,
        dataset,
        state: TrainerState,
        console: Console,
        together: bool,
        untrained: Callable[[], AbstractContextManager],
        trained: Callable[[], AbstractContextManager],
    ) -> None:
        """Compare the first evaluation with the last: print it, and write the report and videos side by side.

        Args:
            dataset: the trainer's eval_dataset.
            state: the trainer's state.
            console: where the comparison is printed.
            together: whether all processes must call the policy at the same time.
            untrained: returns a context in which the policy has its initial weights.
            trained: returns a context in which it has the weights that are saved.
        """
        step, before = self.saved_step(state), {}
        if self.main:
            first_step, before = first_evaluation(self.files, self.last, before_step=step)
        names = broadcast_object_list([list(before)])[0]
        videos = {}
        if self.args.num_sample_videos and (self.main or together):
            for name in names:
                part = dataset[name] if isinstance(dataset, dict) else dataset
                videos[name] = self.evaluator.before_and_after(part, untrained(), trained())
        if before:
            self.comparison = write_report(self.files, (first_step, step), before, self.last, videos)
            print_comparison(self.comparison, f"step {first_step} -> {step}", console)
            self.page.write(self.args, state)

    def write_samples(
        self, name: str, videos: Tensor, prompts: list[str], scores: dict[str, list], tag: str, step: int
    ) -> None:
        """Write sample files; log videos to TensorBoard, and videos, sheet and scores to wandb and trackio."""
        write_samples(self.files, name, videos, prompts, scores, self.args.fps)
        folder = self.files.folder / name
        for tracker in media_trackers(self.callbacks.callbacks):
            clips = [folder / f"{row:03d}.mp4" for row in range(len(videos))]
            log_samples(tracker, tag, clips, folder / "sheet.png", prompts, scores, step)
        for writer in self._tensorboard_writers():
            media.add_gif(writer, tag, videos, step, fps=self.args.fps)

    def list_event_files(self) -> None:
        """Add TensorBoard's event files to the run's list of files, if they are in its folder."""
        folder = Path(self.args.output_dir).resolve()
        for writer in self._tensorboard_writers() if self.main else ():
            for file_writer in writer.all_writers.values():
                path = Path(file_writer.event_writer._file_name).resolve()
                if path.is_relative_to(folder):
                    self.files.add(path.relative_to(folder).as_posix())

    def _tensorboard_writers(self) -> Iterator:
        for callback in self.callbacks.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                yield callback.tb_writer
