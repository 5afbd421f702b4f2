"""Callbacks: a progress bar that says what is being done, and an average of the adapter."""

import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from ....policy import gathered_values, held, held_values, parts_of_values, set_adapter


class StageProgress(TrainerCallback):
    """One bar over optimizer steps, whose text names the stage (rollout, rewards, update, evaluation, saving).

    Where stderr is no terminal, a line with a step's number takes its place, at most one in `LINE_SECONDS`, and one at
    the last step.
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
        parameters: {name: parameter}; of those in parts on several ranks each keeps the average of its part.
        decay: of the average, of which the first steps use (1 + n) / (10 + n) if smaller; or its schedule: the decay
            of the n-th update, from 0.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float | Callable[[int], float]):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = held_values(parameters)
        self.kept: dict[str, torch.Tensor] | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay average + (1 - decay) weights."""
        self.updates += 1
        if callable(self.decay):
            decay = self.decay(self.updates - 1)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(held(parameter).to(self.average[name]), 1 - decay)

    def restart(self) -> None:
        """Average anew from the present weights."""
        self.updates, self.average = 0, held_values(self.parameters)

    def __enter__(self):
        """Inside, the adapter is the average."""
        self.kept = held_values(self.parameters)
        set_adapter(self.parameters, self.average)
        return self

    def __exit__(self, *exception):
        set_adapter(self.parameters, self.kept)
        self.kept = None

    def state_dict(self, weights: bool = False) -> dict:
        """Whole tensors; where ranks hold parts, all must call, and only those that write files get them.

        Args:
            weights: whether the trained weights, too: of the average that is saved in their place.
        """
        state = {"average": self.average}
        if weights:
            state["weights"] = self.kept or {name: held(p) for name, p in self.parameters.items()}
        whole = {name: gathered_values(values, self.parameters) for name, values in state.items()}
        return {"updates": self.updates} | whole

    def load_state_dict(self, state: dict) -> None:
        """The average; the trained weights are its caller's to set."""
        self.updates = state["updates"]
        self.average = {
            name: part.to(self.parameters[name].dtype)
            for name, part in parts_of_values(state["average"], self.parameters).items()
        }
