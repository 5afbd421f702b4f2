"""First-order steps on the grid of a pipeline's own scheduler.

A higher-order solver has no single-step density, but the pipeline expects its grid of noise levels. `on_own_grid`
keeps the class, with its `set_timesteps` and everything else the pipeline uses, and steps along the ODE from one level
to the next.
"""

import copy
import functools

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ...transitions import TRANSITIONS


class _OwnGrid:
    """Base of both grids. Latents are (1 - s) x0 + s e or sqrt(a) x0 + sqrt(1 - a) e, never scaled by sigma."""

    init_noise_sigma = 1.0
    num_inference_steps: int  # of the scheduler's class, as all attributes

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        return sample

    def set_timesteps(self, *args, **kwargs) -> None:
        super().set_timesteps(*args, **kwargs)
        self.keep_grid()
        self.taken = 0

    def step(self, model_output: Tensor, timestep, sample: Tensor, *args, return_dict: bool = True, **kwargs):
        x_next = self.next(model_output.float(), sample.float()).to(sample.dtype)
        self.taken += 1
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)


class FlowGrid(_OwnGrid):
    """The scheduler's sigmas (N + 1,); timesteps (N,) are 1000 sigma with the fraction that UniPC and DPM drop."""

    def keep_grid(self) -> None:
        device = self.timesteps.device
        steps = self.sigmas[:-1][:: self.order]  # the first evaluation of each step (Heun makes two)
        self.sigmas = torch.cat([steps, self.sigmas[-1:]]).float()
        self.timesteps = (steps * self.config.num_train_timesteps).float().to(device)

    def next(self, prediction: Tensor, x: Tensor) -> Tensor:
        s, s_next = self.sigmas[self.taken : self.taken + 2].tolist()
        return x + (s_next - s) * prediction


class AlphaGrid(_OwnGrid):
    """grid_alphas (N + 1,): cumulative alphas at the scheduler's timesteps, 1 / (1 + sigma^2) if it has sigmas."""

    def keep_grid(self) -> None:
        state, kept = vars(self), slice(None, None, self.order)
        if "sigmas" in state:
            self.timesteps, sigmas = self.timesteps[kept], self.sigmas.double().cpu()
            count = len(self.timesteps)
            self.grid_alphas = 1 / (1 + torch.cat([sigmas[kept][:count], sigmas[-1:]]).square())
            return
        self.timesteps = self.timesteps.unique_consecutive()  # PNDM evaluates its second timestep twice
        final = torch.as_tensor(state.get("final_alpha_cumprod", 1.0)).double().reshape(1)
        self.grid_alphas = torch.cat([self.alphas_cumprod.double().cpu()[self.timesteps.cpu().long()], final])

    def next(self, prediction: Tensor, x: Tensor) -> Tensor:
        a, a_next = self.grid_alphas[self.taken : self.taken + 2].float()
        return TRANSITIONS["ddim"].kernel(
            x, prediction, a, a_next, noise_level=0.0, prediction_type=self.config.prediction_type
        )[0]


def on_own_grid(scheduler: SchedulerMixin, kind: type) -> SchedulerMixin:
    """Return a copy of a scheduler that makes first-order steps; `kind` is `FlowGrid` or `AlphaGrid`."""
    base = type(scheduler)

    class OnGrid(kind, base):
        @functools.wraps(base.set_timesteps)  # pipelines inspect both signatures
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)

        @functools.wraps(base.step)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    OnGrid.__name__ = base.__name__
    return as_class(scheduler, OnGrid)


def as_class(scheduler: SchedulerMixin, cls: type) -> SchedulerMixin:
    """Return a copy of a scheduler as `cls`, a subclass, with its state (a shift set later is not in its config)."""
    made = cls.__new__(cls)
    vars(made).update(copy.deepcopy(vars(scheduler)))
    return made
