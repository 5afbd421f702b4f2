"""Load, check and freeze the pipeline that a trainer adapts."""

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
    """Load a pipeline by name.

    Args:
        model: an embedded model ("tiny-wan"), a folder, or a Hub id. A pipeline object is returned as it is.
        dtype: dtype of the weights, except in modules that a model keeps in fp32. None: as diffusers decides.

    Raises:
        ValueError: no pipeline can be loaded from `model`.
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
            f"model={str(model)!r} is not a folder with a diffusers pipeline, a readable Hub id or one of the "
            f"embedded models {assets.available()}: {error}"
        ) from error


def check_unused(pipeline: DiffusionPipeline, base_precision: str | None) -> None:
    """Check that no component has adapters, and undo what an earlier trainer changed in the denoisers.

    That is compiled blocks, fused products and gradient checkpointing.

    Raises:
        ValueError: a component has adapters, is sharded over several ranks, or has FP8 weights although
            `base_precision` is not "fp8".
    """
    modules = {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}
    check_no_adapters(modules)
    for name, module in modules.items():
        if kind_of(name) == "denoiser":
            uncompile_blocks(module)
            unfuse_products(module)
            if base_precision is None and any(isinstance(layer, FP8Linear) for layer in module.modules()):
                raise ValueError(
                    f"{name} has FP8 weights from an earlier trainer, but base_precision is unset: set it "
                    "to 'fp8', or load the pipeline again."
                )
            if module.is_gradient_checkpointing:
                module.disable_gradient_checkpointing()  # type: ignore[operator]


def freeze(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Turn off gradients and dropout in all components; on a CPU, convert a video VAE to a faster memory layout."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    for parameter in pipeline.vae.parameters() if hasattr(pipeline, "vae") else ():
        if parameter.ndim == 5 and device.type == "cpu":  # decodes twice as fast, with the same results
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
