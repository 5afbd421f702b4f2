"""What a video is conditioned on besides its prompt, for instance the first frame of image-to-video.

A list of images is a batch to one pipeline, references of one video or key frames to another, and an error to a third
(Wan), while one image and one prompt mean the same to all. So the pipeline is called once for each conditioned video,
with its own bare values.
"""

from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline

from ..schedule.scheduler import PolicyError

# The policy's own arguments, and those that give all videos of a policy their common shape.
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
    """{argument of the pipeline's call: its value for each of `count` videos}, or a PolicyError.

    Args:
        known: the arguments of the pipeline's call. fixed: those that are the same for all videos.
    """
    checked = {name: list(values) for name, values in (conditions or {}).items()}
    for name, values in checked.items():
        if name not in known or name in RESERVED:
            raise PolicyError(
                f"conditions: {type(pipeline).__name__} takes no argument {name!r} that may differ from video to "
                f"video; it takes {sorted(set(known) - set(RESERVED))}."
            )
        if name in fixed:
            raise PolicyError(f"conditions: {name!r} is among pipeline_kwargs, the same for all videos; drop one.")
        if len(values) != count:
            raise PolicyError(f"conditions: {name!r} has {len(values)} values for {count} prompts; give one each.")
    return checked


def calls(count: int, conditions: Mapping[str, list]) -> list[list[int]]:
    """The videos of each call of the pipeline: all in one, or one each where they are conditioned."""
    return [[row] for row in range(count)] if conditions else [list(range(count))]


def of_video(conditions: Mapping[str, list], rows: Sequence[int]) -> dict:
    """The conditions of the one video of a call, as the pipeline takes them."""
    return {name: values[rows[0]] for name, values in conditions.items()}
