"""Check that a saved adapter is the trained one: read it back, or reload it as plain diffusers does."""

import contextlib
import copy
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ..fast.execution import plain_blocks, uncompile_blocks
from ..fast.products import plain_products, unfuse_products
from ..pipeline.guider import guided
from ..pipeline.offload import device_of
from .adapters import adapted_denoisers
from .lora_files import load_lora, saved_state


def check_saved_weights(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Read a saved adapter back and compare it with the pipeline's, without running a model.

    Raises:
        RuntimeError: a tensor is missing, extra, or not bitwise equal.
    """
    folder = Path(folder)
    for name, denoiser in adapted_denoisers(pipeline).items():
        own, state = get_peft_model_state_dict(denoiser), saved_state(pipeline, folder, name)
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if not torch.equal(own[k].cpu(), state[k])]
        if wrong:
            raise RuntimeError(
                f"the adapter saved in {folder} is not that of {name}: {len(wrong)} tensors are missing, extra or "
                f"differ, e.g. {wrong[0]!r}. Check the disk; the checkpoints are intact."
            )


def without_adapters(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a fresh pipeline of the same class on the same base weights (shared, not copied), without adapters."""
    fresh = copy.copy(pipeline)  # keeps attributes that users set, such as prompt templates
    for name, component in adapted_denoisers(pipeline).items():
        shared = {id(t): t for t in [*component.parameters(), *component.buffers()]}
        component = copy.deepcopy(component, shared)
        for path, module in list(component.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = path.rpartition(".")
                setattr(component.get_submodule(parent), child, module.get_base_layer())
        uncompile_blocks(component)
        unfuse_products(component)
        vars(component).pop("peft_config", None)
        component._hf_peft_config_loaded = False  # type: ignore[assignment]
        setattr(fresh, name, component)
    return fresh


def check_saved_lora(pipeline: DiffusionPipeline, folder: str | os.PathLike, call: dict, tolerance: float) -> float:
    """Load the saved adapter into a fresh pipeline as plain diffusers does, sample, and compare the latents.

    Args:
        pipeline: the trained pipeline.
        folder: where its adapter was saved.
        call: arguments of one short sampling call, without generator and output_type.
        tolerance: largest allowed relative difference of the latents (max abs difference / max abs value).

    Returns:
        The measured difference.

    Raises:
        RuntimeError: the difference exceeds `tolerance`.
    """
    fresh = without_adapters(pipeline)
    load_lora(fresh, folder)
    rounded = {}  # diffusers loads an adapter in the base's dtype; round the trained one alike before comparing
    for key, denoiser in adapted_denoisers(fresh).items():
        for name, parameter in denoiser.named_parameters():
            if "lora_" in name:  # if the base is offloaded, these were created on the CPU
                parameter.data = parameter.data.to(device_of(denoiser))
                rounded[key] = parameter.dtype
    trained = {
        p: p.data
        for key, denoiser in adapted_denoisers(pipeline).items()
        if key in rounded
        for name, p in denoiser.named_parameters()
        if "lora_" in name
    }
    for key in rounded:
        for parameter in adapted_denoisers(pipeline)[key].parameters():
            if parameter in trained:
                parameter.data = parameter.data.to(rounded[key])
    try:
        latents = [latents_of(pipe, adapted_denoisers(pipe).values(), call) for pipe in (pipeline, fresh)]
    finally:
        for parameter, data in trained.items():
            parameter.data = data
    return compare_latents(latents, tolerance, "adapter", folder)


def compare_latents(latents: list[Tensor], tolerance: float, what: str, folder: str | os.PathLike) -> float:
    """Return the largest difference between latents of a trained and a reloaded model, relative to the largest value.

    Args:
        latents: of the trained model and of the reloaded one.
        tolerance: largest allowed difference.
        what: what was saved, for the message.
        folder: where it was saved, for the message.

    Raises:
        RuntimeError: the difference exceeds `tolerance`.
    """
    difference = float((latents[0] - latents[1]).abs().max() / latents[0].abs().max().clamp(min=1e-8))
    if not difference <= tolerance:
        raise RuntimeError(
            f"the {what} saved in {folder} does not reproduce the trained model: latents differ by {difference:.2g} "
            f"(allowed {tolerance:g}). The files were kept; please report this with the pipeline's class name."
        )
    return difference


def latents_of(pipe: DiffusionPipeline, denoisers: Iterable[nn.Module], call: dict) -> Tensor:
    """Return the latents of one call of a pipeline, with its trained denoisers neither compiled nor fused, since that
    would change the rounding."""
    bar = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**(bar or {}) | {"disable": True})
    with contextlib.ExitStack() as plainly, guided(pipe, call) as arguments:
        for denoiser in denoisers:
            plainly.enter_context(plain_blocks(denoiser))
            plainly.enter_context(plain_products(denoiser))
        output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    if bar is None:
        del pipe._progress_bar_config
    else:
        pipe._progress_bar_config = bar
    return output[0].float()
