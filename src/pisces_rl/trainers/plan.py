"""What a step will take, said before the first one."""

import inspect

from torch import nn

from .. import assets
from ..policy import VideoPolicy


def step_plan(policy: VideoPolicy, model: str, args) -> list[str]:
    """One line of videos, their size and the denoising steps; another of memory where the model is not embedded.

    The estimate itself takes as long as a few steps (minutes on a CPU), so its command is printed instead.

    Args:
        model: where the pipeline is from. args: a config whose call is settled.
    """
    known = inspect.signature(inspect.unwrap(type(policy.pipeline).__call__)).parameters
    call = {name: policy.pipeline_kwargs.get(name, known[name].default)
            for name in ("num_frames", "height", "width") if name in known}
    open_ = [name for name, value in call.items() if value is None or value is inspect.Parameter.empty]
    frames = f"{call['num_frames']} frames of " if "num_frames" in call and "num_frames" not in open_ else ""
    size = "the pipeline's own size" if open_ else f"{call.get('height')} x {call.get('width')}"
    plan = [f"{args.videos_a_step()}: {frames}{size}, {args.num_inference_steps} denoising steps"]
    if assets.call_defaults(model):
        return plan
    parts = [c for c in policy.pipeline.components.values() if isinstance(c, nn.Module)]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return plan + [
        f"weights {weights / 2**30:.2f} GiB in all, activations besides: examples/estimate_memory.py, with the "
        f"arguments of this run, estimates the peak"
    ]
