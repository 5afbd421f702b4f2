"""Refuse pipelines with inference-only features that break training, and say what to do."""

import torch
from accelerate.hooks import ModelHook
from diffusers import CacheMixin, DiffusionPipeline
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from ..schedule.scheduler import PolicyError
from .offload import Part

OFFLOAD = (
    "load the pipeline without offloading (and without device_map), and list the components to keep in host memory in "
    'the trainer\'s offload=["text_encoder", "vae"].'
)


def check_trainable(pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module]) -> None:
    """Raise a PolicyError if a pipeline was prepared for inference only.

    Offloading moves weights without the trainer's knowledge. Caches reuse activations of earlier calls, which differ
    between sampling and update. An adapter on fused projections is never called. A compiled denoiser computes
    different bits with and without gradients, which `compile_blocks` avoids.
    """
    components = {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}
    for name, module in components.items():
        hook = vars(module).get("_hf_hook")
        if isinstance(hook, ModelHook) and not isinstance(hook, Part):
            raise PolicyError(f"{name} is offloaded by accelerate ({type(hook).__name__}): {OFFLOAD}")
        if _is_group_offload_enabled(module):
            raise PolicyError(f"{name} is offloaded in groups: {OFFLOAD}")
        if any(parameter.is_inference() for parameter in module.parameters()):
            raise PolicyError(
                f"{name} was created inside torch.inference_mode(), so gradients cannot pass through it; load the "
                "pipeline outside."
            )
    for name, module in denoisers.items():
        if isinstance(module, torch._dynamo.OptimizedModule) or any(
            part._compiled_call_impl is not None for part in module.modules()
        ):
            raise PolicyError(
                f"{name} is already compiled; pass the pipeline as loaded, and set torch_compile=True in the "
                "trainer's args."
            )
        if isinstance(module, CacheMixin) and module.is_cache_enabled:
            raise PolicyError(
                f"{name} reuses activations of earlier denoising steps (enable_cache), which the update does not see; "
                f"call pipeline.{name}.disable_cache() first."
            )
        if any(
            isinstance(part, Attention | AttentionModuleMixin) and part.fused_projections for part in module.modules()
        ):
            raise PolicyError(
                f"{name} has fused projections, so an adapter on to_q, to_k or to_v would never be called; call "
                f"pipeline.{name}.unfuse_qkv_projections() first."
            )
