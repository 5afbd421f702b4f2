"""Estimates printed before training: the work and the memory of a step."""

import inspect

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from ....estimate import estimate_memory
from ....policy import VideoPolicy

GIB = 2**30
#: Estimate memory only above this many bytes of weights: it takes about 20 s on one core, less than such a step.
LARGE = GIB


def step_plan(policy: VideoPolicy, args) -> str:
    """Describe the videos of a step, their size and the denoising steps.

    Args:
        policy: the policy that is trained.
        args: a config after `settle_call`.
    """
    known = inspect.signature(inspect.unwrap(type(policy.pipeline).__call__)).parameters
    call = {
        name: policy.pipeline_kwargs.get(name, known[name].default)
        for name in ("num_frames", "height", "width")
        if name in known
    }
    open_ = [name for name, value in call.items() if value is None or value is inspect.Parameter.empty]
    frames = f"{call['num_frames']} frames of " if "num_frames" in call and "num_frames" not in open_ else ""
    size = "the pipeline's default size" if open_ else f"{call.get('height')} x {call.get('width')}"
    return f"{args.videos_a_step()}: {frames}{size}, {args.num_inference_steps} denoising steps"


def memory_plan(pipeline: DiffusionPipeline, args, peft_config: LoraConfig | str | None) -> str | None:
    """Describe the memory that a run will need; None for a pipeline smaller than `LARGE` bytes.

    It leaves the random state unchanged. Args as in `estimate_memory`; the pipeline must not have adapters yet.
    """
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    if weights < LARGE:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            peaks = estimate_memory(pipeline, args, peft_config).peaks
    except (ValueError, RuntimeError) as error:  # an estimate must not end a run
        return f"memory: {weights / GIB:.1f} GiB of weights; the rest could not be estimated ({error})"
    parts = ", ".join(f"{phase} {peak / GIB:.1f}" for phase, peak in peaks.items())
    return (
        f"estimated memory: {max(peaks.values()) / GIB:.1f} GiB per process ({parts}), plus rewards and evaluation; "
        "examples/estimate_memory.py shows the parts"
    )
