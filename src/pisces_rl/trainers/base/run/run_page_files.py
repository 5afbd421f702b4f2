"""Write run.json and report.html to a run's folder."""

import dataclasses
import json
import warnings

from transformers import TrainerCallback, TrainerState

from ....run_files import RunFiles
from ....run_page import write_page
from ....run_page.read_run import PAGE_FILE, RUN_FILE
from ....whole_files import write_json


class RunPage(TrainerCallback):
    """Writes both files after each evaluation, at the end of training and on `write`.

    A failure is only a warning, so that it does not end the run.

    Args:
        files: files of the run's folder.
        about: {"trainer", "model"} of the run.
        scores: {"rewards": names, "judges": names}.
    """

    def __init__(self, files: RunFiles, about: dict, scores: dict[str, list[str]]):
        self.files, self.about, self.scores = files, about, scores

    def on_evaluate(self, args, state, control, **kwargs):
        self.write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.write(args, state)

    def write(self, args, state: TrainerState) -> None:
        """Write both files on the main process; do nothing before the first log."""
        if not (state.is_world_process_zero and state.log_history):
            return
        try:
            self.files.claim(RUN_FILE, PAGE_FILE)
            write_json(self.files.folder / RUN_FILE, self._content(args, state))
            write_page([self.files.folder])
        except Exception as error:
            warnings.warn(f"{self.files.folder / PAGE_FILE} could not be written: {error}.", stacklevel=2)

    def _content(self, args, state: TrainerState) -> dict:
        settings = self.scores | args.to_dict()  # to_dict hides tokens
        made = {
            field.name: field.default_factory()
            for field in dataclasses.fields(args)
            if field.default_factory is not dataclasses.MISSING
        }
        defaults = {field.name: field.default for field in dataclasses.fields(args)} | made
        given = [name for name in settings if getattr(args, name, None) != defaults.get(name)]
        state = {"global_step": state.global_step, "max_steps": state.max_steps, "log_history": state.log_history}
        content = {
            "trainer": self.about["trainer"],
            "model": self.about["model"],
            "fps": args.fps,
            "given": [*self.scores, *given],
            "settings": settings,
            "state": state,
        }
        return json.loads(json.dumps(content, default=str))
