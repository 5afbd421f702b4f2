"""The checkpoints of a run: find, check, write, read and delete them."""

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
    """Finds, writes and reads the checkpoints of a run; the trainer adds further contents.

    Args:
        files: files of the run's folder.
        identity: what a checkpoint must match, see `run_identity`; `begin` adds the changes made on resume.
        process: index of this process.
        args: a config.
    """

    def __init__(self, files: RunFiles, identity: dict, process: int, args):
        self.files, self.identity, self.process, self.args = files, identity, process, args
        self.limit: int | None = None

    def begin(self, asked: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, or None; raise a ValueError if it does not match this run."""
        checkpoint = requested_checkpoint(self.args.output_dir, asked or self.args.resume_from_checkpoint)
        if checkpoint is not None:
            check_same_run(checkpoint, self.identity)
            self.identity["changes"] = changes_since(checkpoint, self.identity)
        return checkpoint

    def set_aside_earlier_run(self, checkpoint: str | None) -> Path | None:
        """Move files of an earlier run out of the way, unless this run resumes from a checkpoint in its folder.

        Returns:
            The folder that the files were moved to, or None.
        """
        if checkpoint is not None and Path(checkpoint).resolve().parent == self.files.folder.resolve():
            self.files.resume(step_of(checkpoint))
            return None
        return self.files.begin()

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside this context, hide `save_total_limit` from transformers; `save` applies it.

        With a limit of 1, transformers would delete every checkpoint-... at the end, including a user's.
        """
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = self.limit

    def save(self, state: TrainerState, write: Callable[[Path], None]) -> None:
        """Write a checkpoint, whose files `write` writes into a given folder, and remove those beyond the limit."""
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
        """Write the state of the loop and of its `parts`, and the run's identity, which marks a checkpoint as ours."""
        for part in parts:
            if isinstance(part, ExportableState):
                state.stateful_callbacks[type(part).__name__] = part.state()
        state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "policy.json").write_text(json.dumps(self.identity, indent=2), encoding="utf-8")

    @staticmethod
    def read_optimizer(checkpoint: str, optimizer: torch.optim.Optimizer, scheduler) -> None:
        """Load optimizer and schedule, then apply this run's settings; raise a ValueError if they were not saved."""
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
        """Update the path of the best checkpoint, because the run's folder may have moved since it was saved."""
        best = Path(os.path.abspath(checkpoint)).with_name(f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)
