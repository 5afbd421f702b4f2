"""Make any pipeline's steps stochastic: its scheduler, with `step` delegated to a session."""

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXEulerAncestralRFScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ...transitions import TRANSITIONS, Transition
from .grids import AlphaGrid, FlowGrid, as_class, on_own_grid
from .schedules import FlowSchedule, schedule_class, schedule_of

if TYPE_CHECKING:
    from ..sessions.session import Session

#: Flow-matching schedulers, besides Euler's, whose config does not say that they are.
OTHER_FLOW = FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, LTXEulerAncestralRFScheduler


class PolicyError(ValueError):
    """A pipeline cannot be a policy, or a setting does not fit it; the message names the rule and the fix."""


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler that samples a pipeline as a policy: first order, on the grid of the pipeline's scheduler.

    A multistep or ancestral solver has no single-step density, so first-order steps go from one of its noise levels to
    the next (see `grids`). CogVideoX's DPM, which its pipeline calls differently, and EDM's solvers are replaced by
    the first-order scheduler with the same grid.

    Raises:
        PolicyError: no transition fits the scheduler, it clips its prediction, or its settings contradict each other.
    """
    config = dict(scheduler.config)
    name = type(scheduler).__name__
    clips = config.get("clip_sample") and not name.startswith("CogVideoX")  # these ignore the flag
    if clips or config.get("thresholding"):
        raise PolicyError(
            f"{name} has clip_sample={config.get('clip_sample')} and thresholding={config.get('thresholding')}: a "
            "clipped prediction has no Gaussian density. Load the pipeline with a scheduler that does not clip, for "
            "instance DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)."
        )
    if config.get("stochastic_sampling"):
        raise PolicyError(f"{name} has stochastic_sampling=True, a second source of noise; set it to False.")
    first_order = FlowMatchEulerDiscreteScheduler, DDIMScheduler, CogVideoXDDIMScheduler, EDMEulerScheduler
    if isinstance(scheduler, first_order):
        return copy.deepcopy(scheduler)
    if name.startswith("EDM"):
        return EDMEulerScheduler.from_config(scheduler.config)
    if isinstance(scheduler, OTHER_FLOW):
        return on_own_grid(scheduler, FlowGrid)
    sigmas, prediction = config.get("use_flow_sigmas", False), config.get("prediction_type")
    if sigmas != (prediction == "flow_prediction"):
        raise PolicyError(
            f"{name} has use_flow_sigmas={sigmas} and prediction_type={prediction!r}. A flow-matching pipeline needs "
            f"use_flow_sigmas=True and 'flow_prediction'; other pipelines need neither. {flow_config(name)}"
        )
    if sigmas:
        if config.get("flow_shift") is None and not config.get("use_dynamic_shifting"):
            raise PolicyError(f"{name} has flow_shift=None, so it cannot make a schedule. {flow_config(name)}")
        return on_own_grid(scheduler, FlowGrid)
    if name.startswith("CogVideoX"):
        return CogVideoXDDIMScheduler.from_config(scheduler.config)
    if "beta_schedule" in config:
        return on_own_grid(scheduler, AlphaGrid)
    raise PolicyError(
        f"{name} is neither a flow-matching nor an alpha-bar nor an EDM schedule, so no transition fits it. Set the "
        "pipeline's scheduler to FlowMatchEulerDiscreteScheduler, DDIMScheduler or EDMEulerScheduler first."
    )


def flow_config(name: str) -> str:
    """Return the advice for a scheduler of this class whose settings do not fit flow matching."""
    if name not in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        name = "FlowMatchEulerDiscreteScheduler"
        return f"Set pipe.scheduler = {name}(shift=...), with the shift from the model card."
    return (
        f"Set pipe.scheduler = {name}.from_config(pipe.scheduler.config, use_flow_sigmas=True, "
        "prediction_type='flow_prediction', flow_shift=...), with the shift from the model card."
    )


def find_transition(name: str | None, scheduler: SchedulerMixin) -> Transition:
    """Return the named transition, or the family's default; a PolicyError if it does not fit the scheduler."""
    family = schedule_class(scheduler).family
    fitting = [key for key, value in TRANSITIONS.items() if value.family == family]
    if name is None:
        return TRANSITIONS[fitting[0]]
    if name not in fitting:
        raise PolicyError(
            f"transition={name!r} does not fit a pipeline with {type(scheduler).__name__}; use one of {fitting}."
        )
    return TRANSITIONS[name]


def stochastic(scheduler: SchedulerMixin, session: "Session") -> SchedulerMixin:
    """Return a scheduler of the same class whose `step` calls `session.step(prediction, x)`.

    Signatures stay those of the class: pipelines inspect them for `eta`, `generator`, `timesteps` and `sigmas`. A copy
    that the pipeline makes of it is not part of the policy: it steps as the plain class does, along its ODE, and tells
    the session of each step (`Session.follow`).

    EDM has two special rules. A call of `step` without `pred_original_sample` only computes x0^ (Cosmos applies
    guidance to it), so it goes to the class and is not a step. The call with `pred_original_sample` is the step, and
    x0^ is its prediction.
    """
    base: Any = type(scheduler)
    asks_first = schedule_class(scheduler).predicts_clean

    class Stochastic(base):
        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            if not asks_first and hasattr(
                self, "sigmas"
            ):  # some pipelines read one at each step, which would wait for the device
                self.sigmas: Tensor = self.sigmas.cpu()
            _check_grid(self, session)
            session.begin(self)

        def step(
            self, model_output: Any, timestep: Any, sample: Any, *args: Any, return_dict: bool = True, **kwargs: Any
        ) -> Any:
            if asks_first and kwargs.get("pred_original_sample") is None:
                return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
            if session.index == 0:  # not earlier: a pipeline may change its sigmas after set_timesteps
                session.schedule = schedule_of(self, session.policy.transition)
            x_next = session.step(kwargs["pred_original_sample"] if asks_first else model_output, sample)
            if asks_first:
                self._step_index = session.index  # it scales the model's input by this index
            return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

        def __deepcopy__(self, memo: dict) -> SchedulerMixin:
            return _follower(self, base, session, memo)

    Stochastic.step.__signature__ = inspect.signature(base.step)  # type: ignore[attr-defined]
    Stochastic.__name__ = base.__name__
    return as_class(scheduler, Stochastic)


def _follower(scheduler: SchedulerMixin, base: Any, session: "Session", memo: dict) -> SchedulerMixin:
    """Return a copy of a stochastic scheduler that steps as its class does and tells the session of each step."""
    session.followers += 1
    number = session.followers

    class Follower(base):
        def step(
            self, model_output: Any, timestep: Any, sample: Any, *args: Any, return_dict: bool = True, **kwargs: Any
        ) -> Any:
            try:
                own = super().step(model_output, timestep, sample, *args, return_dict=False, **kwargs)[0]
            except ValueError as error:  # a timestep of a schedule that the pipeline made for its own solver
                raise session.fails_with_copies() or error from error
            x_next = session.follow(number, self.steps_taken, sample, own)
            self.steps_taken += 1
            return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    Follower.step.__signature__ = inspect.signature(base.step)  # type: ignore[attr-defined]
    Follower.__name__ = base.__name__
    follower = as_class(scheduler, Follower)
    follower.steps_taken = 0
    return follower


def _check_grid(scheduler: SchedulerMixin, session: "Session") -> None:
    """Check that a flow grid lies in [0, 1] and that a solver's grid has one timestep per step, with falling noise.

    x_s = (1 - s) x0 + s e needs s in [0, 1]; Cosmos 2 puts EDM's sigmas, up to 80, into a flow scheduler.
    """
    pipeline, name = type(session.policy.pipeline).__name__, type(scheduler).__name__
    schedule: Any = schedule_class(scheduler)
    if issubclass(schedule, FlowSchedule) and float(scheduler.sigmas.max()) > 1:
        raise PolicyError(
            f"{pipeline} runs {name} with sigmas up to {float(scheduler.sigmas.max()):g}: a flow-matching schedule "
            "lies in [0, 1], so no transition fits it."
        )
    if not isinstance(scheduler, FlowGrid | AlphaGrid):
        return
    noise = schedule.noise_grid(scheduler)
    falls = bool((noise[1:-1] < noise[:-2]).all()) and noise[-1] <= noise[-2]
    if not falls or len(scheduler.timesteps) != scheduler.num_inference_steps:
        raise PolicyError(
            f"{pipeline} runs {name}, whose timesteps for {scheduler.num_inference_steps} steps, "
            f"{[round(t, 1) for t in scheduler.timesteps.tolist()]}, are not one per step with falling noise, so "
            "first-order steps do not fit them. Set the pipeline's scheduler to DDIMScheduler or, for flow matching, "
            "FlowMatchEulerDiscreteScheduler first."
        )


def sampler_of(scheduler: SchedulerMixin, num_inference_steps: int) -> str:
    """Describe how a scheduler from `training_scheduler` samples."""
    name = type(scheduler).__name__
    grid = f"the grid of {name}" if isinstance(scheduler, FlowGrid | AlphaGrid) else f"{name}'s grid"
    return f"first-order {schedule_class(scheduler).solver}, {num_inference_steps} steps on {grid}"
