"""One run of a policy's pipeline: what happens at each step of the scheduler."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...transitions import log_prob
from ..rollout import Rollout
from ..schedule.scheduler import PolicyError
from ..schedule.schedules import Schedule

if TYPE_CHECKING:
    from ..video_policy import VideoPolicy


@dataclass
class ReplayStep:
    """One trained denoising step of a replay, as a visitor receives it.

    Attributes:
        index: the step's index in the schedule.
        log_prob: (B,) fp32 log p(x' | x) under the current weights; carries gradients.
        prediction: the denoiser's output after guidance, fp32, in the latents' layout; carries gradients.
        mean: mean of the transition, fp32; carries gradients.
        std: scalar standard deviation of the transition.
        gain: |d mean / d prediction|, a scalar: the factor by which the step amplifies the prediction.
        step_size: |s' - s| for a flow schedule, 1 / N for any other; a scalar.
        rows: the B videos of the rollout that are scored; if videos are conditioned, one at a time.
    """

    index: int
    log_prob: Tensor
    prediction: Tensor
    mean: Tensor
    std: Tensor
    gain: Tensor
    step_size: Tensor
    rows: list[int]


class LeavePipeline(BaseException):
    """Raised inside `step` when the rest of the pipeline is not needed."""


@contextlib.contextmanager
def replaced_method(owner: object, name: str, method: Callable) -> Iterator[None]:
    """Make `owner.name(...)` call method(original method, ...) while the context is open."""
    own, before = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, functools.wraps(own)(functools.partial(method, own)))
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


class Session:
    """One run of the pipeline: what happens at each scheduler step."""

    step: Callable[[Tensor, Tensor], Tensor]  # a method of each kind of session: (prediction, x) -> x'

    def __init__(self, policy: "VideoPolicy", prompts: Sequence[str]):
        self.policy, self.prompts = policy, list(prompts)
        self.overrides: dict = {}  # arguments of the pipeline's call for this run
        self.conditions: dict = {}  # arguments for this run's one video, if videos are conditioned
        self.schedule: Schedule  # set at the first step
        self.index = 0
        self.followers = 0  # copies of its scheduler that the pipeline made
        self.lengths_agreed = (
            False  # whether ranks that share weights have agreed how to handle texts of unequal length
        )

    @property
    def needs_prediction(self) -> bool:
        return True

    def begin(self, scheduler: SchedulerMixin) -> None:
        if self.index:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} sets its timesteps again after {self.index} scheduler steps "
                "(it may make a video in sections); a policy needs one schedule, with one step per timestep."
            )

    def fails_with_copies(self) -> PolicyError | None:
        """Return the error if a copy of the scheduler cannot step and the scheduler itself has not stepped."""
        return None if self.index else steps_with_copies(self)

    def follow(self, number: int, index: int, x: Tensor, x_next: Tensor) -> Tensor:
        """Return the `number`-th scheduler copy's next state after x at its step `index`; x_next is its ODE step."""
        return x_next

    def moments(self, prediction: Tensor, x: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        return self.schedule.moments(self.index, prediction, x, noise_level)

    def check_step(self) -> None:
        if self.index >= self.schedule.num_steps:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} calls scheduler.step more than once per timestep; a policy "
                "needs one step per denoising step. Use a first-order pipeline or scheduler."
            )


class Sampling(Session):
    """Draws and records x' at the stochastic steps; the other steps are ODE steps."""

    def __init__(
        self, policy: "VideoPolicy", prompts: Sequence[str], step_seeds: Sequence[int] | None, steps: Sequence[int]
    ):
        super().__init__(policy, prompts)
        self.steps = sorted(steps)
        self.generators = [torch.Generator().manual_seed(seed) for seed in step_seeds or ()]
        self.states: dict[int, Tensor] = {}
        self.means: dict[int, Tensor] = {}
        self.stds: dict[int, Tensor] = {}
        self.log_probs: dict[int, Tensor] = {}
        self.followed: dict[tuple[int, int], Tensor] = {}
        self.rows_per_video = 1
        self.returned: Tensor | None = None
        self.version = 0  # version counter of `returned`, to detect changes in place
        self.passed_on: dict[int, Tensor] = {}  # whether x' of a step reached the next one; read at the end

    def begin(self, scheduler: SchedulerMixin) -> None:
        super().begin(scheduler)
        if self.steps and self.steps[-1] >= len(scheduler.timesteps):
            raise ValueError(f"steps={self.steps} but the schedule has only {len(scheduler.timesteps)} steps.")

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.check_step()
        i = self.index
        if self.returned is not None:
            self._receive(x)
        stochastic_step = i in self.steps
        mean, std = self.moments(prediction, x, self.policy.noise_level if stochastic_step else 0.0)
        if not stochastic_step:
            self.returned = mean.to(x.dtype)
        else:
            if not float(std) > 0:
                raise PolicyError(
                    f"step {i} of {self.schedule.num_steps} has standard deviation {float(std):g}: it is "
                    "deterministic and cannot be trained. Leave it out of sde_window_range, or raise noise_level."
                )
            if x.shape[0] % len(self.prompts):
                raise PolicyError(
                    f"the pipeline's latents have {x.shape[0]} rows for {len(self.prompts)} prompts; a policy needs "
                    "a whole number of rows per video (num_videos_per_prompt must be 1)."
                )
            self.rows_per_video = x.shape[0] // len(self.prompts)
            noise = _on_device(
                torch.cat([torch.randn((self.rows_per_video, *x.shape[1:]), generator=g) for g in self.generators]),
                x.device,
            )
            self.returned = (mean + std * noise).to(x.dtype)  # round first, then score
            # a copy: pipelines may write x' over x (Kandinsky 5)
            self.states[i], self.means[i], self.stds[i] = x.to(torch.float32, copy=True), mean, std
        self.index += 1
        self.version = self.returned._version
        return self.returned

    def _receive(self, x: Tensor) -> None:
        """Record x' as the pipeline passes it on, which is the sample: it may have been rounded (Mochi in bf16).

        Any other change is detected on the device and reported at the end (`check_finished`), to avoid a wait.
        """
        if x is not self.returned or x._version != self.version:
            roundings = (self.returned, *(self.returned.to(d).to(x.dtype) for d in (torch.bfloat16, torch.float16)))
            self.passed_on[self.index - 1] = torch.stack([(x == kind).all() for kind in roundings]).any()
        self._record(x)

    def _record(self, x_next: Tensor) -> None:
        i = self.index - 1
        if i in self.means:
            self.states[i + 1] = x_next.to(torch.float32, copy=True)
            self.log_probs[i] = log_prob(x_next, self.means[i], self.stds[i], self.rows_per_video)

    def check_finished(self) -> None:
        if self.index == 0 and self.followers:
            raise steps_with_copies(self)
        if self.index == 0:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} never called set_timesteps and step of its scheduler (it may "
                "use a copy); a policy needs one call of pipeline.scheduler.step per denoising step."
            )
        if self.index != self.schedule.num_steps:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} took {self.index} scheduler steps for "
                f"{self.schedule.num_steps} timesteps; a policy needs exactly one per timestep."
            )
        self._record(self.returned)
        if not self.passed_on:
            return
        kept = torch.stack(list(self.passed_on.values())).tolist()
        for step, unchanged in zip(self.passed_on, kept):
            if not unchanged:
                raise PolicyError(
                    f"{type(self.policy.pipeline).__name__} changes the latents between scheduler steps (after step "
                    f"{step}); the density of such a transition is unknown. Remove callbacks and options that edit "
                    "latents (FreeInit, callback_on_step_end)."
                )

    def rollout(self, videos: Tensor | None, noise_seeds: list[int]) -> Rollout:
        log_probs = torch.stack([self.log_probs[i] for i in self.steps], 1) if self.steps else None
        return Rollout(
            self.prompts,
            noise_seeds,
            videos,
            self.steps,
            self.states,
            self.means,
            log_probs,
            self.rows_per_video,
            self.followed,
            {name: [value] for name, value in self.conditions.items()},
            self.returned.to(torch.float32, copy=True),
        )

    def follow(self, number: int, index: int, x: Tensor, x_next: Tensor) -> Tensor:
        if index in self.steps:
            self.followed[number, index] = x.float()
        return x_next


class Replay(Session):
    """Scores the recorded x' of the trained steps, and leaves the pipeline after the last."""

    def __init__(self, policy: "VideoPolicy", rollout: Rollout, rows: list[int], visitor: Callable, grad: bool):
        super().__init__(policy, [rollout.prompts[r] for r in rows])
        self.recorded, self.visitor, self.grad = rollout, visitor, grad
        self.videos, self.rows = rows, rollout.state_rows(rows)
        self.steps = set(rollout.steps)
        self.reached: list[tuple[int, Tensor]] = []  # step, difference from the recorded state; read at the end

    @property
    def needs_prediction(self) -> bool:
        return self.index in self.steps

    def begin(self, scheduler: SchedulerMixin) -> None:
        super().begin(scheduler)
        torch.set_grad_enabled(self.grad and 0 in self.steps)

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.check_step()
        i, recorded = self.index, self.recorded
        if i in self.steps:
            self._compare(i, self._recorded(i, x), x)
            mean, std = self.moments(prediction, x, self.policy.noise_level)
            one, zero = torch.ones(()), torch.zeros(())
            gain = self.moments(one, zero, self.policy.noise_level)[0].abs()
            score = log_prob(self._recorded(i + 1, x), mean, std, recorded.rows_per_video)
            step_size = self.schedule.step_size(i)
            self.visitor(ReplayStep(i, score, prediction.float(), mean, std, gain, step_size, self.videos))
        self.index += 1
        if i == max(self.steps):
            raise LeavePipeline
        torch.set_grad_enabled(self.grad and self.index in self.steps)
        return self._recorded(self.index, x).to(x.dtype) if self.index in recorded.states else x.detach()

    def _recorded(self, i: int, x: Tensor) -> Tensor:
        """Return the recorded states of this replay's videos that enter step i, fp32."""
        states = self.recorded.states[i]
        first, count = self.rows[0], len(self.rows)
        if self.rows == list(
            range(first, first + count)
        ):  # a view, since an index would have to be copied to the device
            return states[first : first + count].to(x.device)
        return states[_on_device(torch.tensor(self.rows), states.device)].to(x.device)

    def _compare(self, index: int, recorded: Tensor, x: Tensor) -> None:
        self.reached.append((index, (recorded - x.detach().float()).abs().max()))

    def follow(self, number: int, index: int, x: Tensor, x_next: Tensor) -> Tensor:
        """Return the recorded state for the next step, which depends on the video and on steps skipped here."""
        if index in self.steps:
            self._compare(index, self.recorded.followed_rows((number, index), self.videos).to(x.device), x)
        if index + 1 not in self.steps:
            return x_next.detach()
        return self.recorded.followed_rows((number, index + 1), self.videos).to(x_next)

    def check_finished(self) -> None:
        if self.index <= max(self.steps):
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} stopped at step {self.index} of the replay, before the last "
                f"trained step {max(self.steps)}."
            )
        indices, differences = zip(*self.reached)
        self.comparison = Comparison(type(self.policy.pipeline).__name__, indices, torch.stack(differences))


class Comparison:
    """The differences between a replay's states and the recorded ones, copied to the CPU without waiting for the
    device before `check`."""

    def __init__(self, pipeline: str, indices: Sequence[int], differences: Tensor):
        self.pipeline, self.indices = pipeline, indices
        self.differences = differences.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(differences.device).record_event() if differences.is_cuda else None

    def check(self) -> None:
        """Raise a PolicyError if any difference is not zero."""
        if self.copied is not None:
            self.copied.synchronize()
        for index, difference in zip(self.indices, self.differences.tolist()):
            if not difference == 0:
                raise PolicyError(
                    f"at step {index} the replay reached a state that differs from the recorded one by "
                    f"{difference:.3g}: the pipeline's start noise or latents are not reproducible from its "
                    "generators. Pass generators through, and drop options that edit latents."
                )


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the CPU to a device, on CUDA without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def steps_with_copies(session: Session) -> PolicyError:
    """Return the error for pipelines whose own scheduler makes no step."""
    return PolicyError(
        f"{type(session.policy.pipeline).__name__} steps with copies of its scheduler (one per frame, as in diffusion "
        "forcing); a policy needs one step of pipeline.scheduler per denoising step for all latents. Use a pipeline "
        "that denoises all frames together."
    )


def starts_without_followed(session: Session) -> PolicyError:
    """Return the error for sessions that insert a video's state at a later step."""
    return PolicyError(
        f"{type(session.policy.pipeline).__name__} also denoises something other than the video (audio), with a copy "
        "of its scheduler; a run cannot start at a later step from the video's latents alone, because the state of "
        "the audio there is unknown. Use GRPO, or backpropagation through 'last_steps', 'random_steps' or 'one_step'."
    )
