"""A stochastic step inside any pipeline: the pipeline's scheduler, with `step` handed to a session."""

import copy
import functools
import inspect

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..transitions import TRANSITIONS, Transition


class PolicyError(ValueError):
    """A pipeline cannot be a policy, or a setting does not fit it; the message names the rule and the mend."""


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The first-order schedule on which a pipeline is sampled as a policy.

    A multistep or ancestral solver has no single-step density, so it is replaced by the first-order scheduler of the
    same noise schedule: flow matching by `FlowMatchEulerDiscreteScheduler` with the pipeline's shift (and UniPC's
    integer timesteps, which lose up to 0.999 of a timestep, go), everything with cumulative alphas by
    `DDIMScheduler`, EDM's by `EDMEulerScheduler`.

    Raises:
        PolicyError: no first-order equivalent is known, or the scheduler clips its prediction.
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
        return type(scheduler).from_config(scheduler.config)
    if name.startswith("EDM"):
        return EDMEulerScheduler.from_config(scheduler.config)
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift") or 1.0,
            use_dynamic_shifting=config.get("use_dynamic_shifting", False),
        )
    if name.startswith("CogVideoX"):
        return CogVideoXDDIMScheduler.from_config(scheduler.config)
    if "beta_schedule" in config:
        spacing = config.get("timestep_spacing", "leading")
        spacing = "trailing" if spacing == "linspace" else spacing  # DDIM steps by 1000 // N, whatever the spacing
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False,
                                         timestep_spacing=spacing)
    raise PolicyError(
        f"{name} is neither a flow-matching nor an alpha-bar nor an EDM schedule, so no transition fits it. Set the "
        "pipeline's scheduler to FlowMatchEulerDiscreteScheduler, DDIMScheduler or EDMEulerScheduler first."
    )


def transition_family(scheduler: SchedulerMixin) -> str:
    """"flow", "edm" or "ddim": the kernels that fit a scheduler returned by `training_scheduler`."""
    if isinstance(scheduler, EDMEulerScheduler):
        return "edm"
    return "flow" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else "ddim"


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
        if scheduler.config.invert_sigmas:  # Mochi: time runs from 0 to 1, and the model predicts x0 - e
            sigmas, prediction = 1 - sigmas, -prediction
        return transition.kernel(x, prediction, sigmas[index], sigmas[index + 1], noise_level=noise_level,
                                 sigma_max=sigmas[1], sigma_min=sigmas[-1])
    if transition.family == "edm":
        sigmas = scheduler.host_sigmas
        return transition.kernel(x, prediction, sigmas[index], sigmas[index + 1], noise_level=noise_level)
    alphas = scheduler.alphas_cumprod.float()
    timestep = scheduler.host_timesteps[index]
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_next = alphas[previous] if previous >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod).to(alphas)
    return transition.kernel(x, prediction, alphas[timestep], alpha_next, noise_level=noise_level,
                             prediction_type=scheduler.config.prediction_type)


def _keep_on_host(scheduler: SchedulerMixin) -> None:
    """A copy of the schedule on the CPU: a step's scalars come from there, so that no step waits for the device."""
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.cpu()
        scheduler.host_timesteps = scheduler.timesteps.tolist()
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
            _check_sigmas(self, session)
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
    return Stochastic.from_config(scheduler.config)


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
    follower = Follower.from_config(scheduler.config)
    vars(follower).update(copy.deepcopy(vars(scheduler), memo), steps_taken=0)
    return follower


def _check_sigmas(scheduler: SchedulerMixin, session) -> None:
    """x_s = (1 - s) x0 + s e needs s in [0, 1]; Cosmos 2 puts the sigmas of EDM, up to 80, into a flow scheduler."""
    if transition_family(scheduler) == "flow" and float(scheduler.sigmas.max()) > 1:
        raise PolicyError(
            f"{type(session.policy.pipeline).__name__} runs {type(scheduler).__name__} with sigmas up to "
            f"{float(scheduler.sigmas.max()):g}: a flow-matching schedule lies in [0, 1], so no transition fits it."
        )


def denoised(scheduler, transition: Transition, index: int, prediction: Tensor, x: Tensor) -> Tensor:
    """x0^, the clean sample that step `index` predicts: x - s v, or (x - sqrt(1 - a) e) / sqrt(a), or the prediction
    itself (EDM). fp32."""
    prediction, x = prediction.float(), x.float()
    if transition.family == "edm":
        return prediction
    level = noise_level_of(scheduler, transition, index)
    if transition.family == "flow":
        return x + level * prediction if scheduler.config.invert_sigmas else x - level * prediction
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


def noise_level_of(scheduler, transition: Transition, index: int) -> Tensor:
    """Of step `index`: sigma of a flow or EDM schedule, the cumulative alpha of any other; fp32, on the CPU."""
    if transition.family == "edm":
        return scheduler.host_sigmas[index]
    if transition.family == "flow":
        sigma = scheduler.host_sigmas[index]
        return 1 - sigma if scheduler.config.invert_sigmas else sigma
    return scheduler.alphas_cumprod[scheduler.host_timesteps[index]].float()
