"""Callbacks: a progress bar that shows the current stage, and a moving average of the adapter."""

import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from ....policy import gathered_values, held, held_values, parts_of_values, set_adapter


class StageProgress(TrainerCallback):
    """A progress bar over optimizer steps that names the stage (rollout, rewards, update, evaluation, saving).

    If stderr is not a terminal, print a line with the step instead, at most every `LINE_SECONDS` and at the last step.
    """

    LINE_SECONDS = 30

    def __init__(self):
        self.bar, self.lines, self.next_line = None, False, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        shown = state.is_world_process_zero and not args.disable_tqdm
        self.lines = shown and not sys.stderr.isatty()
        if shown and not self.lines:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                file=sys.stderr,
                smoothing=0.1,
            )

    def stage(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{text:<22}")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (self.bar is None and not self.lines) or not logs or "reward" not in logs:
            return
        shown = {"reward": f"{logs['reward']:.3f}"}
        if "kl" in logs:
            shown["kl"] = f"{logs['kl']:.2g}"
        if self.bar is not None:
            self.bar.set_postfix(shown)
        elif time.monotonic() >= self.next_line or state.global_step >= state.max_steps:
            self.next_line = time.monotonic() + self.LINE_SECONDS
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {state.global_step} of {state.max_steps}: {text}", file=sys.stderr, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class AdapterEMA(TrainerCallback):
    """Exponential moving average of the adapter, updated after each optimizer step.

    Args:
        parameters: {name: parameter}. If a parameter is sharded, each rank averages its part.
        decay: decay of the average; the n-th update uses (1 + n) / (10 + n) if that is smaller. Or a function that
            returns the decay of the n-th update, counted from 0.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float | Callable[[int], float]):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = held_values(parameters)
        self.kept: dict[str, torch.Tensor] | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Update the average: average <- decay average + (1 - decay) weights."""
        self.updates += 1
        if callable(self.decay):
            decay = self.decay(self.updates - 1)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(held(parameter).to(self.average[name]), 1 - decay)

    def restart(self) -> None:
        """Restart the average from the current weights."""
        self.updates, self.average = 0, held_values(self.parameters)

    def __enter__(self):
        """Replace the weights by the average until `__exit__`."""
        self.kept = held_values(self.parameters)
        set_adapter(self.parameters, self.average)
        return self

    def __exit__(self, *exception):
        set_adapter(self.parameters, self.kept)
        self.kept = None

    def state_dict(self, weights: bool = False) -> dict:
        """Return the state with unsharded tensors.

        If weights are sharded, all ranks must call this, and only those that write files get the tensors.

        Args:
            weights: also include the trained weights, for the average that the adapter file holds instead of them.
        """
        state = {"average": self.average}
        if weights:
            state["weights"] = self.kept or {name: held(p) for name, p in self.parameters.items()}
        whole = {name: gathered_values(values, self.parameters) for name, values in state.items()}
        return {"updates": self.updates} | whole

    def load_state_dict(self, state: dict) -> None:
        """Load the average; the caller sets the trained weights."""
        self.updates = state["updates"]
        self.average = {
            name: part.to(self.parameters[name].dtype)
            for name, part in parts_of_values(state["average"], self.parameters).items()
        }
