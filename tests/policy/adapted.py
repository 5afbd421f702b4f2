"""Tiny policies with an adapter that is not zero: B = 0 hides half of the gradients."""

import torch
from tiny_pipelines import BUILD, CALLS, quiet

from pisces_rl.policy import VideoPolicy, add_lora, default_lora_config, lora_parameters


def give_adapter(denoisers: dict, r: int = 4, seed: int = 0, std: float = 0.2, only=None) -> tuple[dict, dict]:
    """The adapter's parameters, and how many modules have one."""
    torch.manual_seed(seed)
    counts = add_lora(denoisers, default_lora_config(r), only)
    parameters = lora_parameters(denoisers)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return parameters, counts


def build(family: str, steps: int = 3) -> tuple[VideoPolicy, dict]:
    """Return a frozen policy that a test may change, and the adapter's parameters."""
    policy = VideoPolicy(quiet(BUILD[family]()), num_inference_steps=steps, pipeline_kwargs=CALLS[family])
    return policy, give_adapter(dict(policy.denoiser.items()))[0]
