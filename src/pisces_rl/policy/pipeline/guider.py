"""Guidance that a pipeline keeps in a guider object (HunyuanVideo 1.5) and not in an argument of its call."""

import contextlib
import inspect
from collections.abc import Iterator

from diffusers import DiffusionPipeline

from ..schedule.scheduler import PolicyError


def has_guider(pipeline: DiffusionPipeline) -> bool:
    """Whether `guidance_scale` is the guider's and no argument of the pipeline's call."""
    known = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    return "guider" in pipeline.components and "guidance_scale" not in known


@contextlib.contextmanager
def guided(pipeline: DiffusionPipeline, call: dict) -> Iterator[dict]:
    """Inside, a pipeline's guider has the call's guidance_scale; yields the arguments that the call itself takes.

    Raises:
        PolicyError: the guider has no guidance_scale.
    """
    if "guidance_scale" not in call or not has_guider(pipeline):
        yield call
        return
    guider, scale = pipeline.guider, call["guidance_scale"]
    if "guidance_scale" not in guider.config:
        raise PolicyError(
            f"guidance_scale={scale}: the guider of this pipeline, {type(guider).__name__}, has none. Leave "
            "guidance_scale out, or set pipe.guider to ClassifierFreeGuidance."
        )
    own = guider.guidance_scale
    guider.guidance_scale = scale
    try:
        yield {name: value for name, value in call.items() if name != "guidance_scale"}
    finally:
        guider.guidance_scale = own
