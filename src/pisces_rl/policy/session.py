"""One run of a pipeline as a policy sees it: what happens at each step of the scheduler."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..transitions import log_prob
from .rollout import Rollout
from .scheduler import PolicyError, kernel_moments


@dataclass
class ReplayStep:
    """One trained denoising step of a replay, as a visitor receives it.

    Attributes:
        index: the step's index in the schedule.
        log_prob: (B,) fp32 log p(x' | x) under the current weights; carries gradients.
        prediction: the denoiser's output after guidance, fp32, latents' layout; carries gradients.
        mean: mean of the transition, fp32; carries gradients.
        std: scalar standard deviation of the transition.
        gain: |d mean / d prediction|, a scalar: by how much the step amplifies the prediction.
        step_size: |s' - s| of a flow schedule, 1 / N of an alpha-bar schedule; a scalar.
    """

    index: int
    log_prob: Tensor
    prediction: Tensor
    mean: Tensor
    std: Tensor
    gain: Tensor
    step_size: Tensor


class LeavePipeline(BaseException):
    """Raised inside `step` when the rest of the pipeline is not needed."""


@contextlib.contextmanager
def replaced_method(owner, name: str, method: Callable) -> Iterator[None]:
    """`owner.name` calls method(own method, ...) inside, and is as it was afterwards."""
    own, before = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, functools.wraps(own)(functools.partial(method, own)))
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


class Session:
    """One run of the pipeline: what happens at each scheduler step."""

    def __init__(self, policy, prompts: Sequence[str]):
        self.policy, self.prompts = policy, list(prompts)
        self.overrides: dict = {}  # arguments of the pipeline's call for this run
        self.scheduler, self.index = None, 0

    needs_prediction = True

    def begin(self, scheduler) -> None:
        if self.scheduler is not None and scheduler is not self.scheduler:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} steps with copies of its scheduler (one a frame, as diffusion "
                "forcing does); a policy needs one step of pipeline.scheduler per denoising step for all latents. Use "
                "a pipeline that denoises all frames together."
            )
        self.scheduler, self.index = scheduler, 0

    def moments(self, prediction: Tensor, x: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        return kernel_moments(self.scheduler, self.policy.transition, self.index, prediction, x, noise_level)

    def check_step(self) -> None:
        if self.index >= len(self.scheduler.timesteps):
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} calls scheduler.step more than once per timestep; a policy "
                "needs one step per denoising step. Use a pipeline or scheduler of first order."
            )


class Sampling(Session):
    """Draws x' at the stochastic steps and records them; ODE steps elsewhere."""

    def __init__(self, policy, prompts: Sequence[str], step_seeds: Sequence[int] | None,
                 steps: Sequence[int]):
        super().__init__(policy, prompts)
        self.steps = sorted(steps)
        self.generators = [torch.Generator().manual_seed(seed) for seed in step_seeds or ()]
        self.states, self.means, self.log_probs = {}, {}, {}
        self.stds: dict[int, Tensor] = {}
        self.rows_per_video = 1
        self.returned: Tensor | None = None

    def begin(self, scheduler) -> None:
        super().begin(scheduler)
        if self.steps and self.steps[-1] >= len(scheduler.timesteps):
            raise ValueError(f"steps={self.steps} but the schedule has only {len(scheduler.timesteps)} steps.")

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.check_step()
        i = self.index
        if self.returned is not None:
            self._accept_rounding(x)
        stochastic_step = i in self.steps
        mean, std = self.moments(prediction, x, self.policy.noise_level if stochastic_step else 0.0)
        if not stochastic_step:
            self.returned = mean.to(x.dtype)
        else:
            if not float(std) > 0:
                raise PolicyError(
                    f"step {i} of {len(self.scheduler.timesteps)} has standard deviation {float(std):g}: it is "
                    "deterministic and cannot be trained. Leave it out of sde_window_range, or raise noise_level."
                )
            if x.shape[0] % len(self.prompts):
                raise PolicyError(
                    f"the pipeline's latents have {x.shape[0]} rows for {len(self.prompts)} prompts; a policy needs "
                    "a whole number of rows a video (num_videos_per_prompt must be 1)."
                )
            self.rows_per_video = x.shape[0] // len(self.prompts)
            noise = torch.cat([
                torch.randn((self.rows_per_video, *x.shape[1:]), generator=g) for g in self.generators
            ]).to(x.device)
            self.returned = (mean + std * noise).to(x.dtype)  # round first, then score
            # a copy: pipelines may write x' over x (Kandinsky 5)
            self.states[i], self.means[i], self.stds[i] = x.to(torch.float32, copy=True), mean, std
            self._record(i, self.returned)
        self.index += 1
        return self.returned

    def _record(self, i: int, x_next: Tensor) -> None:
        self.states[i + 1] = x_next.float()
        self.log_probs[i] = log_prob(x_next, self.means[i], self.stds[i], self.rows_per_video)

    def _accept_rounding(self, x: Tensor) -> None:
        """Pipelines may round the latents between steps (Mochi in bf16): then the rounded x' is what was sampled."""
        if torch.equal(x, self.returned):
            return
        rounded = any(torch.equal(x, self.returned.to(d).to(x.dtype)) for d in (torch.bfloat16, torch.float16))
        if not rounded:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} changes the latents between scheduler steps (step "
                f"{self.index}); the density of such a transition is unknown. Remove callbacks and options that edit "
                "latents (FreeInit, callback_on_step_end)."
            )
        if self.index - 1 in self.means:
            self._record(self.index - 1, x)

    def check_finished(self) -> None:
        if self.scheduler is None or self.index == 0:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} never called its scheduler's set_timesteps and step (it may "
                "work on a copy); a policy needs pipeline.scheduler.step once per denoising step."
            )
        if self.index != len(self.scheduler.timesteps):
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} took {self.index} scheduler steps for "
                f"{len(self.scheduler.timesteps)} timesteps; a policy needs exactly one each."
            )

    def rollout(self, videos: Tensor | None, noise_seeds: list[int]) -> Rollout:
        log_probs = torch.stack([self.log_probs[i] for i in self.steps], 1) if self.steps else None
        return Rollout(self.prompts, noise_seeds, videos, self.steps, self.states, self.means, log_probs,
                       self.rows_per_video)


class Replay(Session):
    """Scores the recorded x' of the trained steps, and leaves after the last."""

    def __init__(self, policy, rollout: Rollout, rows: list[int], visitor: Callable, grad: bool):
        super().__init__(policy, [rollout.prompts[r] for r in rows])
        self.recorded, self.visitor, self.grad = rollout, visitor, grad
        self.rows = rollout.state_rows(rows)
        self.steps = set(rollout.steps)

    @property
    def needs_prediction(self) -> bool:
        return self.index in self.steps

    def begin(self, scheduler) -> None:
        super().begin(scheduler)
        torch.set_grad_enabled(self.grad and 0 in self.steps)

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.check_step()
        i, recorded = self.index, self.recorded
        if i in self.steps:
            state = recorded.states[i][self.rows].to(x.device)
            if not torch.equal(state, x.float()):
                raise PolicyError(
                    f"at step {i} the replay reached a state that differs from the recorded one by "
                    f"{float((state - x.float()).abs().max()):.3g}: the pipeline's start noise or latents are not "
                    "reproducible from its generators. Pass generators through, and drop options that edit latents."
                )
            mean, std = self.moments(prediction, x, self.policy.noise_level)
            one, zero = torch.ones((), device=x.device), torch.zeros((), device=x.device)
            gain = self.moments(one, zero, self.policy.noise_level)[0].abs()
            x_next = recorded.states[i + 1][self.rows].to(x.device)
            score = log_prob(x_next, mean, std, recorded.rows_per_video)
            if self.policy.transition.family == "flow":
                step_size = (self.scheduler.sigmas[i + 1] - self.scheduler.sigmas[i]).abs()
            else:
                step_size = one / len(self.scheduler.timesteps)
            self.visitor(ReplayStep(i, score, prediction.float(), mean, std, gain, step_size))
        self.index += 1
        if i == max(self.steps):
            raise LeavePipeline
        torch.set_grad_enabled(self.grad and self.index in self.steps)
        following = recorded.states.get(self.index)
        return x.detach() if following is None else following[self.rows].to(device=x.device, dtype=x.dtype)

    def check_finished(self) -> None:
        if self.index <= max(self.steps):
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} stopped at step {self.index} of the replay, before the last "
                f"trained step {max(self.steps)}."
            )
