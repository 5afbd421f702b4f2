"""A run's noise schedule: one class per family, with the numbers of each step.

What: `schedule_of(scheduler, transition)` returns the object that holds all numbers of a session's steps. Why: a
scheduler's family, its coordinates and the sign of its prediction are decided here and nowhere else. How: a session
creates one at its first step, because a pipeline may change its sigmas after `set_timesteps`. Gotcha: every scalar is
fp32 on the CPU, so that no step waits for the device; sigma comes from the step's index, never from the integer
timestep, which drops the fraction.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...transitions import Transition
from .grids import AlphaGrid, FlowGrid


class Schedule(ABC):
    """The steps of one run: x = signal x0 + noise e at each, and a kernel that goes from one to the next.

    Args:
        scheduler: what `training_scheduler` returned, after its `set_timesteps`.
        transition: one that fits the scheduler, see `find_transition`.

    Attributes:
        family: family of the transitions that fit.
        solver: name of the deterministic first-order step.
        predicts_clean: whether the pipeline itself converts the model's output to x0^, which is then the prediction.
        num_steps: N.
    """

    family: ClassVar[str]
    solver: ClassVar[str] = "Euler"
    predicts_clean: ClassVar[bool] = False

    def __init__(self, scheduler: SchedulerMixin, transition: Transition):
        self.kernel = transition.kernel
        self.num_steps = len(scheduler.timesteps)

    @abstractmethod
    def moments(self, index: int, prediction: Tensor, x: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        """Return (mean, std) of the transition from x at step `index`, fp32; noise level 0 is the ODE step."""

    @abstractmethod
    def level(self, index: int) -> Tensor:
        """Return sigma of a flow or EDM schedule, the cumulative alpha of an alpha-bar schedule; a scalar."""

    @abstractmethod
    def scales(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the scalars (signal, noise) in x = signal x0 + noise e."""

    @abstractmethod
    def denoised(self, index: int, prediction: Tensor, x: Tensor) -> Tensor:
        """Return x0^, the clean sample that the prediction at step `index` implies, fp32."""

    def noised(self, index: int, x0: Tensor, noise: Tensor) -> Tensor:
        """Return clean x0 with noise at the level of step `index`, signal x0 + noise e, fp32."""
        signal, scale = self.scales(index)
        return signal * x0.float() + scale * noise.float()

    def step_size(self, index: int) -> Tensor:
        """Return |s' - s| for a flow schedule, 1 / N for any other; a scalar."""
        return torch.ones(()) / self.num_steps

    def time(self, index: int) -> Tensor:
        """Return t in [0, 1], the share of noise in flow-matching coordinates; a scalar.

        In these coordinates every family is a flow: with t = noise / (signal + noise),

            x / (signal + noise) = (1 - t) x0 + t e,        v = e - x0

        t is sigma (flow), sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) (alpha-bar) or s / (1 + s) (EDM). Two predictions
        from the same x differ in velocity by v - v' = -(x0^ - x0^') / t, whatever the family.
        """
        signal, noise = self.scales(index)
        return noise / (signal + noise)


class FlowSchedule(Schedule):
    """Flow matching: x = (1 - s) x0 + s e; the model predicts v = e - x0."""

    family = "flow"

    def __init__(self, scheduler: SchedulerMixin, transition: Transition):
        super().__init__(scheduler, transition)
        self.sigmas = self.noise_grid(scheduler)
        self.step_sizes = scheduler.sigmas.float().cpu().diff().abs()

    @staticmethod
    def noise_grid(scheduler: SchedulerMixin) -> Tensor:
        """Return sigma (N + 1,) at every timestep of a scheduler; 1 is pure noise."""
        return scheduler.sigmas.float().cpu()

    @staticmethod
    def velocity(prediction: Tensor) -> Tensor:
        """Return e - x0 from a model's output, fp32."""
        return prediction.float()

    def moments(self, index: int, prediction: Tensor, x: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        sigmas = self.sigmas
        return self.kernel(
            x.float(),
            self.velocity(prediction),
            sigmas[index],
            sigmas[index + 1],
            noise_level=noise_level,
            sigma_max=sigmas[1],
            sigma_min=sigmas[-1],
        )

    def level(self, index: int) -> Tensor:
        return self.sigmas[index]

    def scales(self, index: int) -> tuple[Tensor, Tensor]:
        return 1 - self.sigmas[index], self.sigmas[index]

    def denoised(self, index: int, prediction: Tensor, x: Tensor) -> Tensor:
        """Return x - s v."""
        return x.float() - self.sigmas[index] * self.velocity(prediction)

    def step_size(self, index: int) -> Tensor:
        return self.step_sizes[index]

    def time(self, index: int) -> Tensor:
        return self.sigmas[index]


class InvertedFlowSchedule(FlowSchedule):
    """Mochi's schedule: time runs from 0 (noise) to 1 (clean), and the model predicts x0 - e."""

    @staticmethod
    def noise_grid(scheduler: SchedulerMixin) -> Tensor:
        return 1 - scheduler.sigmas.float().cpu()

    @staticmethod
    def velocity(prediction: Tensor) -> Tensor:
        return -prediction.float()


class AlphaBarSchedule(Schedule):
    """x = sqrt(a) x0 + sqrt(1 - a) e, with a the cumulative alpha; epsilon-, v- and sample-prediction."""

    family, solver = "ddim", "DDIM"

    def __init__(self, scheduler: SchedulerMixin, transition: Transition):
        super().__init__(scheduler, transition)
        self.alphas = _alphas(scheduler)
        self.prediction_type = scheduler.config.prediction_type

    @staticmethod
    def noise_grid(scheduler: AlphaGrid) -> Tensor:
        """Return 1 - a (N + 1,) at every timestep of a scheduler on its own grid, fp64; 1 is pure noise."""
        return 1 - scheduler.grid_alphas

    def moments(self, index: int, prediction: Tensor, x: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        return self.kernel(
            x.float(),
            prediction.float(),
            *self.alphas[index],
            noise_level=noise_level,
            prediction_type=self.prediction_type,
        )

    def level(self, index: int) -> Tensor:
        return self.alphas[index][0]

    def scales(self, index: int) -> tuple[Tensor, Tensor]:
        alpha = self.level(index)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def denoised(self, index: int, prediction: Tensor, x: Tensor) -> Tensor:
        """Return the kernel's step to a = 1, for instance (x - sqrt(1 - a) e) / sqrt(a)."""
        alpha = self.level(index)
        return self.kernel(
            x.float(),
            prediction.float(),
            alpha,
            torch.ones_like(alpha),
            noise_level=0.0,
            prediction_type=self.prediction_type,
        )[0]


class EDMSchedule(Schedule):
    """x = x0 + s e; the prediction is x0^ after EDM's preconditioning."""

    family = "edm"
    predicts_clean = True

    def __init__(self, scheduler: SchedulerMixin, transition: Transition):
        super().__init__(scheduler, transition)
        self.sigmas = scheduler.sigmas.float().cpu()

    def moments(self, index: int, prediction: Tensor, x: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        return self.kernel(
            x.float(), prediction.float(), self.sigmas[index], self.sigmas[index + 1], noise_level=noise_level
        )

    def level(self, index: int) -> Tensor:
        return self.sigmas[index]

    def scales(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.ones(()), self.sigmas[index]

    def denoised(self, index: int, prediction: Tensor, x: Tensor) -> Tensor:
        """Return the prediction itself."""
        return prediction.float()


def schedule_class(scheduler: SchedulerMixin) -> type[Schedule]:
    """Return the schedule class for a scheduler that `training_scheduler` returned."""
    if isinstance(scheduler, EDMEulerScheduler):
        return EDMSchedule
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowGrid):
        return InvertedFlowSchedule if scheduler.config.get("invert_sigmas") else FlowSchedule
    return AlphaBarSchedule


def schedule_of(scheduler: SchedulerMixin, transition: Transition) -> Schedule:
    """Return the schedule of a scheduler whose timesteps are set."""
    return schedule_class(scheduler)(scheduler, transition)


def _alphas(scheduler: SchedulerMixin) -> list[tuple[Tensor, Tensor]]:
    """Return the cumulative alphas (from, to) of each step, fp32."""
    if isinstance(scheduler, AlphaGrid):
        alphas = scheduler.grid_alphas.float()
        return list(zip(alphas[:-1], alphas[1:]))
    alphas, stride = scheduler.alphas_cumprod.float().cpu(), scheduler.config.num_train_timesteps
    stride //= scheduler.num_inference_steps  # DDIM steps by this, whatever the spacing of its timesteps
    final = torch.as_tensor(scheduler.final_alpha_cumprod).to(alphas)
    return [(alphas[t], alphas[t - stride] if t >= stride else final) for t in scheduler.timesteps.tolist()]
