"""A stochastic step inside any pipeline: the pipeline's scheduler, with `step` handed to a session."""

import functools
import inspect

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
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
    `DDIMScheduler`.

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
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, DDIMScheduler, CogVideoXDDIMScheduler)):
        return type(scheduler).from_config(scheduler.config)
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift") or 1.0,
            use_dynamic_shifting=config.get("use_dynamic_shifting", False),
        )
    if name.startswith("CogVideoX"):
        return CogVideoXDDIMScheduler.from_config(scheduler.config)
    if "beta_schedule" in config:
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    raise PolicyError(
        f"{name} is neither a flow-matching nor an alpha-bar schedule, so no transition fits it. Set the pipeline's "
        "scheduler to FlowMatchEulerDiscreteScheduler or DDIMScheduler first."
    )


def transition_family(scheduler: SchedulerMixin) -> str:
    """"flow" or "ddim": the kernels that fit a scheduler returned by `training_scheduler`."""
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
        sigmas = scheduler.sigmas.to(device=x.device, dtype=torch.float32)
        if scheduler.config.invert_sigmas:  # Mochi: time runs from 0 to 1, and the model predicts x0 - e
            sigmas, prediction = 1 - sigmas, -prediction
        return transition.kernel(x, prediction, sigmas[index], sigmas[index + 1], noise_level=noise_level,
                                 sigma_max=sigmas[1], sigma_min=sigmas[-1])
    alphas = scheduler.alphas_cumprod.to(device=x.device, dtype=torch.float32)
    timestep = int(scheduler.timesteps[index])
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_next = alphas[previous] if previous >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod).to(alphas)
    return transition.kernel(x, prediction, alphas[timestep], alpha_next, noise_level=noise_level,
                             prediction_type=scheduler.config.prediction_type)


def stochastic(scheduler: SchedulerMixin, session) -> SchedulerMixin:
    """A scheduler of the same class whose `step` is `session.step(index, prediction, x)`.

    The index counts the calls since `set_timesteps`. Signatures stay those of the class: pipelines inspect them for
    `eta`, `generator`, `timesteps` and `sigmas`.
    """
    base = type(scheduler)

    class Stochastic(base):
        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            session.begin(self)

        def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
            x_next = session.step(model_output, sample)
            return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    Stochastic.step.__signature__ = inspect.signature(base.step)
    Stochastic.__name__ = base.__name__
    return Stochastic.from_config(scheduler.config)


def denoised(scheduler, transition: Transition, index: int, prediction: Tensor, x: Tensor) -> Tensor:
    """x0^, the clean sample that step `index` predicts: x - s v, or (x - sqrt(1 - a) e) / sqrt(a). fp32."""
    prediction, x = prediction.float(), x.float()
    level = noise_level_of(scheduler, transition, index).to(x.device)
    if transition.family == "flow":
        return x + level * prediction if scheduler.config.invert_sigmas else x - level * prediction
    return transition.kernel(x, prediction, level, torch.ones_like(level), noise_level=0.0,
                             prediction_type=scheduler.config.prediction_type)[0]


def noised(scheduler, transition: Transition, index: int, x0: Tensor, noise: Tensor) -> Tensor:
    """The clean x0 at the noise level of step `index`: (1 - s) x0 + s e, or sqrt(a) x0 + sqrt(1 - a) e. fp32."""
    level = noise_level_of(scheduler, transition, index).to(x0.device)
    if transition.family == "flow":
        return (1 - level) * x0.float() + level * noise.float()
    return level.sqrt() * x0.float() + (1 - level).sqrt() * noise.float()


def noise_level_of(scheduler, transition: Transition, index: int) -> Tensor:
    """Of step `index`: the fraction s of noise of a flow schedule, the cumulative alpha of any other; fp32."""
    if transition.family == "flow":
        sigma = scheduler.sigmas[index].float()
        return 1 - sigma if scheduler.config.invert_sigmas else sigma
    return scheduler.alphas_cumprod[int(scheduler.timesteps[index])].float()
