"""Conditions of a video besides its prompt, for instance the first frame of image-to-video.

Pipelines read a list of images differently: as a batch, as references or key frames of one video, or as an error
(Wan). One image and one prompt mean the same to all. So the pipeline is called once per conditioned video, with that
video's value instead of a list.
"""

from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline

from ..schedule.scheduler import PolicyError

# Arguments that the policy sets itself, and those that set the common shape of all its videos.
RESERVED = (
    "self",
    "prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "height",
    "width",
    "num_frames",
    "callback",
    "callback_on_step_end",
)

Conditions = Mapping[str, Sequence]


def checked_conditions(
    pipeline: DiffusionPipeline, known: Sequence[str], conditions: Conditions | None, count: int, fixed: Mapping
) -> dict[str, list]:
    """Return {argument of the pipeline's call: its value for each of `count` videos}, or raise a PolicyError.

    Args:
        pipeline: the pipeline, for messages.
        known: arguments that the pipeline's call takes.
        conditions: {argument: values}, to be checked.
        count: number of videos.
        fixed: arguments with the same value for all videos.
    """
    checked = {name: list(values) for name, values in (conditions or {}).items()}
    for name, values in checked.items():
        if name not in known or name in RESERVED:
            raise PolicyError(
                f"conditions: {type(pipeline).__name__} takes no argument {name!r} that may differ between videos; it "
                f"takes {sorted(set(known) - set(RESERVED))}."
            )
        if name in fixed:
            raise PolicyError(f"conditions: {name!r} is also in pipeline_kwargs, for all videos; remove one of them.")
        if len(values) != count:
            raise PolicyError(
                f"conditions: {name!r} has {len(values)} values for {count} prompts; give one per prompt."
            )
    return checked


def calls(count: int, conditions: Mapping[str, list]) -> list[list[int]]:
    """Return the videos of each call of the pipeline: all in one call, or one per call if they are conditioned."""
    return [[row] for row in range(count)] if conditions else [list(range(count))]


def of_video(conditions: Mapping[str, list], rows: Sequence[int]) -> dict:
    """Return the conditions of a call's one video as arguments of the pipeline."""
    return {name: values[rows[0]] for name, values in conditions.items()}
