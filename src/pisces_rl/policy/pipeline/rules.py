"""Rules for pipelines and policy settings; a PolicyError says which rule is broken."""

import inspect
from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..schedule.scheduler import PolicyError, flow_config, training_scheduler
from ..schedule.schedules import FlowSchedule, schedule_class
from .guider import has_guider
from .offload import kind_of


def denoisers_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return a pipeline's denoisers by name; a PolicyError if it has none, or lacks a scheduler or `encode_prompt`."""
    found = {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and kind_of(name) == "denoiser"
    }
    if not found:
        raise PolicyError(
            f"{type(pipeline).__name__} has no component named transformer or unet (it has "
            f"{sorted(pipeline.components)}); a policy needs a denoiser."
        )
    for need in ("scheduler", "encode_prompt"):
        if not hasattr(pipeline, need):
            raise PolicyError(f"{type(pipeline).__name__} has no {need}; a policy needs one.")
    return found


def scheduler_of(pipeline: DiffusionPipeline) -> SchedulerMixin:
    """Return the scheduler that samples the policy; a PolicyError if the model predicts a flow but its scheduler is
    not set up for one."""
    scheduler = training_scheduler(pipeline.scheduler)
    declared = inspect.signature(type(pipeline).__init__).parameters.get("scheduler")
    flows = declared is not None and declared.annotation is FlowMatchEulerDiscreteScheduler
    if flows and not issubclass(schedule_class(scheduler), FlowSchedule):
        name = type(pipeline.scheduler).__name__
        raise PolicyError(
            f"{type(pipeline).__name__} is a flow-matching pipeline, but its {name} is not set up for one: it has "
            f"prediction_type={pipeline.scheduler.config.get('prediction_type')!r}. {flow_config(name)}"
        )
    return scheduler


def checked_kwargs(pipeline: DiffusionPipeline, kwargs: dict) -> dict:
    """Check the user's pipeline arguments; a PolicyError if one is unknown, or would change latents or noise."""
    known = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    check_call(kwargs)
    for name, value in kwargs.items():
        if name not in known and not (name == "guidance_scale" and has_guider(pipeline)):
            raise PolicyError(
                f"{type(pipeline).__name__} takes no argument {name!r}; it takes {sorted(set(known) - {'self'})}."
            )
        if name in ("callback_on_step_end", "callback", "latents", "generator") and value is not None:
            raise PolicyError(f"pipeline argument {name!r} would change the policy's latents or noise; leave it out.")
        if name.startswith("num_") and name.endswith("_per_prompt") and value != 1:
            raise PolicyError(f"{name}={value}: repeat the prompt instead, once per video.")
    for name in ("prompt", "generator", "output_type", "num_inference_steps"):
        if name not in known:
            raise PolicyError(f"{type(pipeline).__name__}.__call__ has no argument {name!r}; a policy needs it.")
    return kwargs


def check_call(kwargs: Mapping) -> None:
    """Check pipeline arguments as far as possible without a pipeline.

    Raises:
        PolicyError: a size is not a whole number of at least 1, or a prompt argument is a list.
    """
    for name in ("height", "width", "num_frames"):
        value = kwargs.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            what = "frames" if name == "num_frames" else "pixels"
            raise PolicyError(f"{name}={value!r} must be a whole number of {what}, at least 1, or left out.")
    for name, value in kwargs.items():
        if "prompt" in name and isinstance(value, (list, tuple)):
            raise PolicyError(
                f"{name}={value!r} is a list, but a policy calls the pipeline with any number of videos. Give one "
                "string, which all videos get."
            )


def check_video(pipeline: DiffusionPipeline, kwargs: Mapping, shape: Sequence[int]) -> None:
    """Raise a PolicyError if videos (B, F, 3, H, W) do not have the requested size: some pipelines round it."""
    made = {"num_frames": shape[1], "height": shape[3], "width": shape[4]}
    for name, value in made.items():
        if kwargs.get(name) not in (None, value):
            raise PolicyError(
                f"{name}={kwargs[name]}, but {type(pipeline).__name__} rounds it and made {value}. Set {name}={value} "
                "or another value that it does not round."
            )


def checked_window(size: int | None, window: Sequence[int] | None, num_steps: int) -> tuple[int, int]:
    """Return the range [low, high) of steps that may be trained; the last step is never stochastic."""
    if num_steps == 1 and size is None and window is None:
        return 0, 0  # can sample and backpropagate, but has no stochastic step
    low, high = (0, num_steps - 1) if window is None else (int(window[0]), int(window[1]))
    if not 0 <= low < high <= num_steps - 1:
        raise PolicyError(
            f"sde_window_range={[low, high]} must satisfy 0 <= low < high <= {num_steps - 1} "
            f"(num_inference_steps - 1: noise drawn at the last step would stay in the video)."
        )
    if size is not None and not 1 <= size <= high - low:
        raise PolicyError(f"sde_window_size={size} must be between 1 and {high - low}, the length of its range.")
    return low, high
