"""`merge_adapter`: add a saved adapter to the base model's weights, as a component that diffusers loads."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..policy import check_no_adapters, read_adapter
from ..policy.full.component_files import save_components
from .adapter_export import fitting


@dataclass(frozen=True)
class Merged:
    """Result of a merge for one denoiser.

    Attributes:
        modules: the number of adapted modules.
        weights: the number of values in their weights.
        changed: how many of these values changed; in bf16, a small change can round to none.
    """

    modules: int
    weights: int
    changed: int


@torch.no_grad()
def merge_adapter(
    model: DiffusionPipeline | nn.Module, folder: str | os.PathLike, output: str | os.PathLike | None = None
) -> dict[str, Merged]:
    r"""Add a saved LoRA adapter to the weights of its base model, in place: W becomes W + s B A.

    The sum is computed in fp32 and rounded to W's dtype. All adapted denoisers are merged, including both experts of
    Wan 2.2, which `pipe.fuse_lora()` does not do.

    Args:
        model: a pipeline or its denoiser, without adapters.
        folder: the adapter, see `export_adapter`.
        output: a folder to save each merged denoiser to, in a subfolder with its name, for
            `WanTransformer3DModel.from_pretrained(output, subfolder="transformer")`. It must not be the adapter's
            folder. None saves nothing.

    Returns:
        {denoiser: what changed}.

    Raises:
        ValueError: there is no adapter, or it is for another model or a DoRA; the model has adapters, or weights that
            are quantized or stored in 8 bits; or `output` is the adapter's folder. No weight is changed then.
    """
    adapter = read_adapter(folder, "folder")
    if len(adapter.states) > 1 and not isinstance(model, DiffusionPipeline):
        raise ValueError(f"folder={adapter.source!r} adapts {sorted(adapter.states)}: give the pipeline as model.")
    adapter, denoisers = fitting(adapter, model)
    check_no_adapters(denoisers)
    if output is not None:
        output, source = Path(output).expanduser(), Path(folder).expanduser()
        home = (source.parent if source.is_file() else source).resolve()
        if home in {place.resolve() for place in (output, *(output / name for name in denoisers))}:
            raise ValueError(
                f"output={str(output)!r} is the adapter's folder, where the merged weights would be loaded as fully "
                "trained weights; choose another folder."
            )
    for name, denoiser in denoisers.items():
        for module in adapter.configs[name].target_modules:
            weight: Any = denoiser.get_submodule(module).weight
            if not weight.is_floating_point() or weight.dtype.itemsize == 1 or type(weight) is not nn.Parameter:
                raise ValueError(
                    f"{module} of {name} is a {type(weight).__name__} of {weight.dtype}, which cannot be merged "
                    "into; load the model in bfloat16 or float32."
                )
    merged = {}
    for name, denoiser in denoisers.items():
        weights = changed = 0
        modules = sorted(adapter.configs[name].target_modules)
        for module in modules:
            weight = denoiser.get_submodule(module).weight
            total = (weight.float() + adapter.delta(name, module).to(weight.device)).to(weight.dtype)
            weights, changed = weights + weight.numel(), changed + int((total != weight).sum())
            weight.copy_(total)
        merged[name] = Merged(len(modules), weights, changed)
    if output is not None:
        save_components(SimpleNamespace(**denoisers), list(denoisers), output)
    return merged
