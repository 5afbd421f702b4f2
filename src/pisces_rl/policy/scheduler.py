"""A stochastic step inside any pipeline: the pipeline's scheduler, with `step` handed to a session."""

import copy
import functools
import inspect

import torch
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

from ..transitions import TRANSITIONS, Transition
from .grids import AlphaGrid, FlowGrid, as_class, on_own_grid

#: Schedulers of flow matching, besides Euler's, whose config does not say so.
OTHER_FLOW = FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, LTXEulerAncestralRFScheduler


class PolicyError(ValueError):
    """A pipeline cannot be a policy, or a setting does not fit it; the message names the rule and the mend."""


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler by which a pipeline is sampled as a policy: first order, on the grid of the pipeline's own.

    A multistep or ancestral solver has no single-step density, so it steps by first order from one of its noise
    levels to the next (see `grids`). CogVideoX's DPM, whose pipeline calls it otherwise, and EDM's solvers give way to
    the first-order scheduler of the same grid.

    Raises:
        PolicyError: no transition fits the scheduler, it clips its prediction, or its settings contradict each other.
    """
    config = dict(scheduler.config)
    name = type(scheduler).__name__
    clips = config.get("clip_sample") and not name.startswith("CogVideoX")  # which ignore the flag
    if clips or config.get("thresholding"):
        raise PolicyError(
            f"{name} has clip_sample={config.get('clip_sample')} and thresholding={config.get('thresholding')}: a "
            "clipped prediction has no Gaussian density. Load the pipeline with a scheduler that clips nothing, for "
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
            f"use_flow_sigmas=True with 'flow_prediction', any other pipeline neither. {flow_config(name)}"
        )
    if sigmas:
        if config.get("flow_shift") is None and not config.get("use_dynamic_shifting"):
            raise PolicyError(f"{name} has flow_shift=None, from which it makes no schedule. {flow_config(name)}")
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
    """What to do about a scheduler of that class whose settings do not fit flow matching."""
    if name not in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        name = "FlowMatchEulerDiscreteScheduler"
        return f"Set pipe.scheduler = {name}(shift=...), with the shift of the model's card."
    return (
        f"Set pipe.scheduler = {name}.from_config(pipe.scheduler.config, use_flow_sigmas=True, "
        "prediction_type='flow_prediction', flow_shift=...), with the shift of the model's card."
    )


def transition_family(scheduler: SchedulerMixin) -> str:
    """"flow", "edm" or "ddim": the kernels that fit a scheduler returned by `training_scheduler`."""
    if isinstance(scheduler, EDMEulerScheduler):
        return "edm"
    return "flow" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowGrid) else "ddim"


def find_transition(name: str | None, scheduler: SchedulerMixin) -> Transition:
    """The named transition, or the family's default; a PolicyError where it does not fit the scheduler."""
    family = transition_family(scheduler)
    fitting = [key for key, value in TRANSITIONS.items() if value.family == family]
    if name is None:
        return TRANSITIONS[fitting[0]]
    if name not in fitting:
        raise PolicyError(
            f"transition={name!r} does not fit a pipeline with {type(scheduler).__name__}; use one of {fitting}."
        )
    return TRANSITIONS[name]


def kernel_moments(scheduler, transition: Transition, index: int, prediction: Tensor, x: Tensor,
                   noise_level: float) -> tuple[Tensor, Tensor]:
    """(mean, std) of step `index`, from the schedule's own numbers in fp32; noise level 0 is the ODE step.

    sigma comes from the step's index, never from the integer timestep, which loses its fraction.
    """
    prediction, x = prediction.float(), x.float()
    if transition.family == "flow":
        sigmas = scheduler.host_sigmas
        if scheduler.config.get("invert_sigmas"):  # Mochi: time runs from 0 to 1, and the model predicts x0 - e
            sigmas, prediction = 1 - sigmas, -prediction
        return transition.kernel(x, prediction, sigmas[index], sigmas[index + 1], noise_level=noise_level,
                                 sigma_max=sigmas[1], sigma_min=sigmas[-1])
    if transition.family == "edm":
        sigmas = scheduler.host_sigmas
        return transition.kernel(x, prediction, sigmas[index], sigmas[index + 1], noise_level=noise_level)
    alpha, alpha_next = scheduler.host_alphas[index]
    return transition.kernel(x, prediction, alpha, alpha_next, noise_level=noise_level,
                             prediction_type=scheduler.config.prediction_type)


def _alphas(scheduler: SchedulerMixin) -> list[tuple[Tensor, Tensor]]:
    """The cumulative alphas between which each step goes, fp32."""
    if isinstance(scheduler, AlphaGrid):
        alphas = scheduler.grid_alphas.float()
        return list(zip(alphas[:-1], alphas[1:]))
    alphas, stride = scheduler.alphas_cumprod.float(), scheduler.config.num_train_timesteps
    stride //= scheduler.num_inference_steps  # by which DDIM steps, whatever the spacing of its timesteps
    final = torch.as_tensor(scheduler.final_alpha_cumprod).to(alphas)
    return [(alphas[t], alphas[t - stride] if t >= stride else final) for t in scheduler.timesteps.tolist()]


def _keep_on_host(scheduler: SchedulerMixin) -> None:
    """A copy of the schedule on the CPU: a step's scalars come from there, so that no step waits for the device."""
    if transition_family(scheduler) == "ddim":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.cpu()
        scheduler.host_alphas = _alphas(scheduler)
    else:
        scheduler.host_sigmas = scheduler.sigmas.float().cpu()


def stochastic(scheduler: SchedulerMixin, session) -> SchedulerMixin:
    """A scheduler of the same class whose `step` is `session.step(index, prediction, x)`.

    The index counts the calls since `set_timesteps`. Signatures stay those of the class: pipelines inspect them for
    `eta`, `generator`, `timesteps` and `sigmas`. A copy that the pipeline makes of it is no part of the policy: it is
    a scheduler of the plain class, and what it moves follows its ODE (`Session.follow`).

    Two rules for EDM: a call of `step` without `pred_original_sample` only asks for x0^ (Cosmos mixes its guidance
    there), so it is the class's own and no step; the call that gives it is the step, and x0^ its prediction.
    """
    base = type(scheduler)
    asks_first = transition_family(scheduler) == "edm"

    class Stochastic(base):
        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            if not asks_first and hasattr(self, "sigmas"):  # some pipelines read one each step, which would wait
                self.sigmas = self.sigmas.cpu()
            _check_grid(self, session)
            session.begin(self)

        def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
            if asks_first and kwargs.get("pred_original_sample") is None:
                return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
            if session.index == 0:  # not before: a pipeline may change its sigmas after set_timesteps
                _keep_on_host(self)
            x_next = session.step(kwargs["pred_original_sample"] if asks_first else model_output, sample)
            if asks_first:
                self._step_index = session.index  # from which it scales the model's input
            return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

        def __deepcopy__(self, memo):
            return _follower(self, base, session, memo)

    Stochastic.step.__signature__ = inspect.signature(base.step)
    Stochastic.__name__ = base.__name__
    return as_class(scheduler, Stochastic)


def _follower(scheduler: SchedulerMixin, base: type, session, memo: dict) -> SchedulerMixin:
    """A copy of a stochastic scheduler that steps as the class does and tells the session of each step."""
    session.followers += 1
    number = session.followers

    class Follower(base):
        def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
            try:
                own = super().step(model_output, timestep, sample, *args, return_dict=False, **kwargs)[0]
            except ValueError as error:  # a time of a schedule that the pipeline made for its own solver
                raise session.fails_with_copies() or error from error
            x_next = session.follow(number, self.steps_taken, sample, own)
            self.steps_taken += 1
            return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    Follower.step.__signature__ = inspect.signature(base.step)
    Follower.__name__ = base.__name__
    follower = as_class(scheduler, Follower)
    follower.steps_taken = 0
    return follower


def _check_grid(scheduler: SchedulerMixin, session) -> None:
    """x_s = (1 - s) x0 + s e needs s in [0, 1]; Cosmos 2 puts the sigmas of EDM, up to 80, into a flow scheduler.
    A solver's own grid must have one time a step, with less noise at each."""
    pipeline, name = type(session.policy.pipeline).__name__, type(scheduler).__name__
    if transition_family(scheduler) == "flow" and float(scheduler.sigmas.max()) > 1:
        raise PolicyError(
            f"{pipeline} runs {name} with sigmas up to {float(scheduler.sigmas.max()):g}: a flow-matching schedule "
            "lies in [0, 1], so no transition fits it."
        )
    if not isinstance(scheduler, FlowGrid | AlphaGrid):
        return
    levels = scheduler.sigmas if isinstance(scheduler, FlowGrid) else 1 - scheduler.grid_alphas
    if scheduler.config.get("invert_sigmas"):
        levels = 1 - levels
    falls = bool((levels[1:-1] < levels[:-2]).all()) and levels[-1] <= levels[-2]
    if not falls or len(scheduler.timesteps) != scheduler.num_inference_steps:
        raise PolicyError(
            f"{pipeline} runs {name}, whose times for {scheduler.num_inference_steps} steps, "
            f"{[round(t, 1) for t in scheduler.timesteps.tolist()]}, are not one for each step with less noise at "
            "each, so first-order steps do not fit them. Set the pipeline's scheduler to DDIMScheduler or, for flow "
            "matching, FlowMatchEulerDiscreteScheduler first."
        )


def sampler_of(scheduler: SchedulerMixin, num_inference_steps: int) -> str:
    """In words, how a scheduler of `training_scheduler` samples."""
    name = type(scheduler).__name__
    grid = f"the grid of {name}" if isinstance(scheduler, FlowGrid | AlphaGrid) else f"{name}'s grid"
    step = "DDIM" if transition_family(scheduler) == "ddim" else "Euler"
    return f"first-order {step}, {num_inference_steps} steps on {grid}"


def denoised(scheduler, transition: Transition, index: int, prediction: Tensor, x: Tensor) -> Tensor:
    """x0^, the clean sample that step `index` predicts: x - s v, or (x - sqrt(1 - a) e) / sqrt(a), or the prediction
    itself (EDM). fp32."""
    prediction, x = prediction.float(), x.float()
    if transition.family == "edm":
        return prediction
    level = noise_level_of(scheduler, transition, index)
    if transition.family == "flow":
        return x + level * prediction if scheduler.config.get("invert_sigmas") else x - level * prediction
    return transition.kernel(x, prediction, level, torch.ones_like(level), noise_level=0.0,
                             prediction_type=scheduler.config.prediction_type)[0]


def noised(scheduler, transition: Transition, index: int, x0: Tensor, noise: Tensor) -> Tensor:
    """The clean x0 at the noise level of step `index`: (1 - s) x0 + s e, or sqrt(a) x0 + sqrt(1 - a) e, or x0 + s e
    (EDM). fp32."""
    level = noise_level_of(scheduler, transition, index)
    if transition.family == "edm":
        return x0.float() + level * noise.float()
    if transition.family == "flow":
        return (1 - level) * x0.float() + level * noise.float()
    return level.sqrt() * x0.float() + (1 - level).sqrt() * noise.float()


def time_of(scheduler, transition: Transition, index: int) -> Tensor:
    level = noise_level_of(scheduler, transition, index)
    if transition.family == "edm":
        return level / (1 + level)
    if transition.family == "flow":
        return level
    return (1 - level).sqrt() / (level.sqrt() + (1 - level).sqrt())


def noise_level_of(scheduler, transition: Transition, index: int) -> Tensor:
    """Of step `index`: sigma of a flow or EDM schedule, the cumulative alpha of any other; fp32, on the CPU."""
    if transition.family == "edm":
        return scheduler.host_sigmas[index]
    if transition.family == "flow":
        sigma = scheduler.host_sigmas[index]
        return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma
    return scheduler.host_alphas[index][0]
