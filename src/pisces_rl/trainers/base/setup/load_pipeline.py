"""The pipeline that a trainer adapts: found by name, frozen."""

import os

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from torch import nn

from .... import assets
from ....policy import check_no_adapters
from ....policy.fast.execution import uncompile_blocks
from ....policy.fast.fp8 import FP8Linear
from ....policy.fast.products import unfuse_products
from ....policy.pipeline.offload import kind_of


def load_pipeline(model: str | DiffusionPipeline, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A pipeline by name: an embedded model ("tiny-wan"), a folder, or a Hub id. A pipeline passes through.

    Args:
        dtype: dtype of the weights; modules that a model keeps in fp32 stay so. None leaves it to diffusers.
    """
    if isinstance(model, DiffusionPipeline):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"model={model!r} must be a diffusers pipeline, a Hub id, a folder or one of {assets.available()}."
        )
    path = assets.asset_path(model) if model in assets.available() else model
    try:
        return DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"model={str(model)!r} is neither a folder with a diffusers pipeline, nor a Hub id that could be read, "
            f"nor one of the embedded models {assets.available()}: {error}"
        ) from error


def check_unused(pipeline: DiffusionPipeline, base_precision: str | None) -> None:
    """That no component has adapters; what an earlier trainer left on the denoisers (compiled blocks, fused products,
    recomputation in backward) goes.

    Raises:
        ValueError: a component carries adapters, lies in parts on several ranks, or holds FP8 weights that are not
            asked for.
    """
    modules = {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}
    check_no_adapters(modules)
    for name, module in modules.items():
        if kind_of(name) == "denoiser":
            uncompile_blocks(module)
            unfuse_products(module)
            if base_precision is None and any(isinstance(layer, FP8Linear) for layer in module.modules()):
                raise ValueError(
                    f"{name} has FP8 weights of an earlier trainer, but base_precision is unset: set it "
                    "to 'fp8', or load the pipeline again."
                )
            if module.is_gradient_checkpointing:
                module.disable_gradient_checkpointing()


def freeze(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """No gradients and no dropout in any component; on a CPU a video decoder in its faster memory layout."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    for parameter in pipeline.vae.parameters() if hasattr(pipeline, "vae") else ():
        if parameter.ndim == 5 and device.type == "cpu":  # the same numbers, decoded twice as fast
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
