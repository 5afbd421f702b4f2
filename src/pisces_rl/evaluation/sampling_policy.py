"""A model, before or after training, to sample from: `pisces-rl sample` and `pisces-rl vbench export`."""

import hashlib
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from pisces_rl.assets import call_defaults
from pisces_rl.policy import VideoPolicy, add_lora, check_no_adapters, read_adapter
from pisces_rl.policy.full.component_files import load_components
from pisces_rl.trainers import load_pipeline

_STEPS = 16  # as of the trainers' configs, where neither the user nor an embedded model says how many


def sampling_policy(
    model: str | DiffusionPipeline, *, num_inference_steps: int | None, call: dict | None, bf16: bool
) -> tuple[VideoPolicy, dict]:
    """The base model as a policy on the CPU, and its settings: model, num_inference_steps, call, bf16.

    Args:
        model: a pipeline, or its name as of `load_pipeline`. A pipeline must carry no adapter.
        num_inference_steps, call: of the pipeline's call; what is unset is as in training.
        bf16: weights and autocast in bfloat16, else fp32.

    Raises:
        ValueError: no such model, or one that carries an adapter.
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
    """Put a saved LoRA, or components that were trained whole, into the policy; returns a digest of the weights."""
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
