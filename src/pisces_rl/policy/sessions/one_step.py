"""Predict at one step from any state, by the same call of the pipeline as for a whole sample."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..schedule.scheduler import PolicyError
from .session import LeavePipeline, Session, starts_without_followed

if TYPE_CHECKING:
    from ..video_policy import VideoPolicy


@dataclass
class Prediction:
    """A prediction at one step; latents are fp32, in the scheduler's layout.

    Attributes:
        state: the latents that entered the step.
        clean: x0^.
        following: the state after the ODE step.
        time: the step's share of noise t in [0, 1], a scalar, see `Schedule.time`.
    """

    state: Tensor
    clean: Tensor
    following: Tensor
    time: Tensor

    @staticmethod
    def cat(parts: Sequence["Prediction"]) -> "Prediction":
        """Join the predictions of all videos, in order."""
        latents = [f.name for f in fields(Prediction) if f.name != "time"]
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in latents}
        return Prediction(**joined, time=parts[0].time)


class OneStep(Session):
    """Skips to a step, inserts latents there, and leaves with the prediction.

    Args:
        policy: the policy.
        prompts: one per video.
        at: index of the step.
        latents: clean latents, or with seeds=None those that enter the step; unused at step 0.
        seeds: seeds of the noise that brings clean latents to the step's level.
        grad: build a graph at the step.
        overrides: arguments of the pipeline's call for this run.
    """

    def __init__(
        self,
        policy: "VideoPolicy",
        prompts: Sequence[str],
        at: int,
        latents: Tensor | None,
        seeds: Sequence[int] | None,
        grad: bool,
        overrides: dict,
    ):
        super().__init__(policy, prompts)
        self.at, self.latents, self.seeds, self.grad, self.overrides = at, latents, seeds, grad, overrides
        self.found: Prediction | None = None

    @property
    def needs_prediction(self) -> bool:
        return self.index == self.at

    def begin(self, scheduler: SchedulerMixin) -> None:
        super().begin(scheduler)
        if not 0 <= self.at < len(scheduler.timesteps):
            raise ValueError(f"step={self.at} must be from 0 to {len(scheduler.timesteps) - 1}, the schedule's last.")
        torch.set_grad_enabled(self.grad and self.at == 0)

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.check_step()
        if self.index == self.at:
            self.found = Prediction(
                x.detach().float(),
                self.schedule.denoised(self.at, prediction, x),
                self.moments(prediction, x, 0.0)[0],
                self.schedule.time(self.at),
            )
            raise LeavePipeline
        self.index += 1
        if self.index < self.at:
            return x
        torch.set_grad_enabled(self.grad)
        if self.seeds is None:
            return self.latents.to(x)
        return self.schedule.noised(self.at, self.latents, seeded_noise(self.latents, self.seeds)).to(x)

    def follow(self, number: int, index: int, x: Tensor, x_next: Tensor) -> Tensor:
        raise starts_without_followed(self)

    def check_finished(self) -> None:
        if self.found is None:
            raise PolicyError(f"{type(self.policy.pipeline).__name__} never reached step {self.at} of its schedule.")


def seeded_noise(latents: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return normal noise shaped like latents (B * rows, ...), drawn from one seed per video."""
    shape = latents.shape[0] // len(seeds), *latents.shape[1:]
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return noise.to(latents.device)
