"""Models before and after training, for sampling: `pisces-rl sample` and `pisces-rl vbench export`."""

import hashlib
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from pisces_rl.assets import call_defaults
from pisces_rl.policy import VideoPolicy, add_lora, check_no_adapters, read_adapter
from pisces_rl.policy.full.component_files import load_components
from pisces_rl.trainers import load_pipeline

_STEPS = 16  # the trainers' default, if neither the user nor a built-in model sets it


def sampling_policy(
    model: str | DiffusionPipeline, *, num_inference_steps: int | None, call: dict | None, bf16: bool
) -> tuple[VideoPolicy, dict]:
    """Load the base model as a policy on the CPU; return it and its settings: model, num_inference_steps, call, bf16.

    Args:
        model: a pipeline without an adapter, or a name that `load_pipeline` accepts.
        num_inference_steps: denoising steps; None uses the training default.
        call: other arguments of the pipeline's call; those that are unset default to those of training.
        bf16: True for weights and autocast in bfloat16, False for fp32.

    Raises:
        ValueError: the model does not exist, or the pipeline has an adapter.
    """
    pipeline = load_pipeline(model, torch.bfloat16 if bf16 else torch.float32)
    name = model if isinstance(model, str) else pipeline.name_or_path or type(pipeline).__name__
    call = call_defaults(name) | (call or {})
    default_steps = call.pop("num_inference_steps", _STEPS)
    steps = num_inference_steps or default_steps
    policy = VideoPolicy(
        pipeline, num_inference_steps=steps, pipeline_kwargs=call, autocast_dtype=torch.bfloat16 if bf16 else None
    )
    check_no_adapters(policy.denoiser)
    return policy, {"model": str(name), "num_inference_steps": steps, "call": call, "bf16": bf16}


def add_trained(policy: VideoPolicy, source: str | os.PathLike) -> str:
    """Load a saved LoRA, or fully trained components, into the policy; return a digest of the weights."""
    folder = Path(source).expanduser()
    files = {name: sorted(folder.glob(f"{name}/diffusion_pytorch_model*.safetensors")) for name in policy.denoiser}
    whole = [name for name, found in files.items() if found]
    if whole:
        load_components(policy.pipeline, whole, folder)
        content = hashlib.sha256()
        for path in (path for name in whole for path in files[name]):
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    content.update(block)
        return content.hexdigest()
    try:
        saved = read_adapter(source)
        add_lora(dict(policy.denoiser.items()), start=saved)
    except ValueError as error:
        raise ValueError(str(error).replace("continue_from=", "adapter=")) from error
    return saved.digest
