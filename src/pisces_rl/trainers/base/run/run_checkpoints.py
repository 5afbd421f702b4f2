"""The checkpoints of a run: with which it may go on, what it takes of one, and which of its own stay."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from ....run_files import RunFiles
from .checkpoint import load_tree, random_state, remove_old_checkpoints, restore_random_state, save_tree, write_whole
from .resume import changes_since, check_same_run, follow_settings, requested_checkpoint, step_of


class RunCheckpoints:
    """Finds, publishes and reads the checkpoints of a run; what is in them beside its own parts is the trainer's.

    Args:
        files: of the run's folder. identity: what a checkpoint must agree with, see `run_identity`; `begin` adds what
            changes where the run is resumed. process: this one's index. args: a config.
    """

    def __init__(self, files: RunFiles, identity: dict, process: int, args):
        self.files, self.identity, self.process, self.args = files, identity, process, args
        self.limit: int | None = None

    def begin(self, asked: str | bool | None) -> str | None:
        """A run begins: the checkpoint that it resumes from; a ValueError where that is another run's."""
        checkpoint = requested_checkpoint(self.args.output_dir, asked or self.args.resume_from_checkpoint)
        if checkpoint is not None:
            check_same_run(checkpoint, self.identity)
            self.identity["changes"] = changes_since(checkpoint, self.identity)
        return checkpoint

    def set_aside_earlier_run(self, checkpoint: str | None) -> Path | None:
        """A run that does not resume from a checkpoint in its folder must not find another's files beside its own;
        returns where these are now."""
        if checkpoint is not None and Path(checkpoint).resolve().parent == self.files.folder.resolve():
            self.files.resume(step_of(checkpoint))
            return None
        return self.files.begin()

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside, `save_total_limit` is obeyed here: with a limit of 1, transformers deletes at its end all that is
        named checkpoint-..., a user's, too."""
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = self.limit

    def save(self, state: TrainerState, write: Callable[[Path], None]) -> None:
        """Publish the checkpoint that `write` writes into a folder, and remove those beyond the limit."""
        final = Path(self.args.output_dir) / f"checkpoint-{state.global_step}"
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(final)
        write_whole(final, write, self.process, self.args.should_save)
        if self.args.should_save:
            best = state.best_model_checkpoint
            remove_old_checkpoints(
                self.args.output_dir, self.limit, keep=[final] if best is None else [final, best], own=self.files.own
            )

    def write_random_state(self, folder: Path) -> None:
        save_tree(random_state(), folder / f"random_{self.process}")

    def read_random_state(self, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint) / f"random_{self.process}"
        if path is not None and path.with_suffix(".json").exists():
            restore_random_state(load_tree(path))

    def write_state(self, folder: Path, state: TrainerState, parts: Iterable) -> None:
        """The loop's state with that of its `parts`, and the run's identity, by which it is known as a checkpoint."""
        for part in parts:
            if isinstance(part, ExportableState):
                state.stateful_callbacks[type(part).__name__] = part.state()
        state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "policy.json").write_text(json.dumps(self.identity, indent=2), encoding="utf-8")

    @staticmethod
    def read_optimizer(checkpoint: str, optimizer: torch.optim.Optimizer, scheduler) -> None:
        """Load both; they take the settings of this run. A ValueError where the checkpoint has none."""
        if not (Path(checkpoint) / "optimizer.json").exists():
            raise ValueError(
                f"{checkpoint} was saved with save_only_model=True: it has no optimizer state to resume from."
            )
        groups = [dict(group) for group in optimizer.param_groups]
        for name, own in {"optimizer": optimizer, "scheduler": scheduler}.items():
            own.load_state_dict(load_tree(Path(checkpoint) / name))
        follow_settings(optimizer, scheduler, groups)

    @staticmethod
    def find_best(checkpoint: str, state: TrainerState) -> None:
        """The state names the best checkpoint by a whole path, which the run's folder may have left."""
        best = Path(os.path.abspath(checkpoint)).with_name(f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)
