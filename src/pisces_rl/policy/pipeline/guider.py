"""Guidance of pipelines that take it from a guider object (HunyuanVideo 1.5) instead of an argument of their call."""

import contextlib
import inspect
from collections.abc import Iterator

from diffusers import DiffusionPipeline

from ..schedule.scheduler import PolicyError


def has_guider(pipeline: DiffusionPipeline) -> bool:
    """Return whether `guidance_scale` belongs to a guider and is not an argument of the pipeline's call."""
    known = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    return "guider" in pipeline.components and "guidance_scale" not in known


@contextlib.contextmanager
def guided(pipeline: DiffusionPipeline, call: dict) -> Iterator[dict]:
    """Set a pipeline's guider to the call's guidance_scale; yield the arguments that the call itself takes.

    Raises:
        PolicyError: the guider has no guidance_scale.
    """
    if "guidance_scale" not in call or not has_guider(pipeline):
        yield call
        return
    guider, scale = pipeline.guider, call["guidance_scale"]
    if "guidance_scale" not in guider.config:
        raise PolicyError(
            f"guidance_scale={scale}: this pipeline's guider, {type(guider).__name__}, has no guidance_scale. Leave "
            "it out, or set pipe.guider to ClassifierFreeGuidance."
        )
    own = guider.guidance_scale
    guider.guidance_scale = scale
    try:
        yield {name: value for name, value in call.items() if name != "guidance_scale"}
    finally:
        guider.guidance_scale = own
