"""`export_adapter`: write a saved adapter in the layout and with the names that another program reads."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save
from torch import Tensor, nn

from ..hub import describe_exports
from ..policy import SavedAdapter, check_fits, has_lora_loader, read_adapter
from ..policy.lora.lora_files import config_dict, write_peft_layout
from ..policy.lora.saved_adapter import LORA_FILE
from ..policy.pipeline.offload import kind_of
from ..run_files import add_listed
from ..whole_files import atomically
from .original_names import FAMILIES, FORMATS, Part

#: The number formats that `export_adapter` writes.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXPERTS = {"transformer": "_high_noise", "transformer_2": "_low_noise"}  # of Wan 2.2


def export_adapter(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    format: str = "diffusers",
    *,
    dtype: str = "bf16",
    model: str | DiffusionPipeline | nn.Module | None = None,
) -> list[Path]:
    r"""Write a saved LoRA adapter for another program.

    A module's weight W (out, in) becomes W + s B A, with A (r, in), B (out, r) and s = alpha / r, or alpha / sqrt(r)
    if it is rank-stabilized. "comfyui" and "original" files hold A and s B. If the original keeps several projections
    of diffusers in one weight, as HunyuanVideo does q, k and v, their LoRAs become one with the summed rank and a
    block-diagonal B:

        [W_q; W_k; W_v] + diag(s_q B_q, s_k B_k, s_v B_v) [A_q; A_k; A_v]

    which is exact. Rows of projections without a LoRA are zero.

    "comfyui" files of Wan, CogVideoX and Mochi also hold `X.alpha` = r, a scalar in fp32, so that readers with and
    without alpha / r scaling add the same. Files of HunyuanVideo, LTX and LTX-2, and Wan's layers outside its blocks,
    have no alpha, since diffusers would refuse it. "original" files have none either: their readers add B A.

    Args:
        folder: a folder saved by a trainer, `pipe.save_lora_weights` or peft; a safetensors file in diffusers' layout;
            or a Hub id.
        output: a folder. It may be `folder`, but not in the layout that `folder` already has.
        format: "diffusers": pytorch_lora_weights.safetensors, with a second expert (Wan 2.2) in transformer_2/.
            "peft": adapter_model.safetensors and adapter_config.json in a subfolder for each denoiser.
            "comfyui": comfyui_lora.safetensors, for ComfyUI's LoRA nodes. "original": original_lora.safetensors, with
            the names of the published checkpoint. Wan 2.2's two experts get one file each,
            ..._high_noise.safetensors and ..._low_noise.safetensors.
        dtype: number format of A and B: "bf16", "fp16" or "fp32".
        model: the adapted model: its pipeline or denoiser, to check the adapter against, or the name of its family
            (`FAMILIES`) or diffusers class. None uses the class recorded in the adapter's file.

    Returns:
        The files written. If `output` is a run's folder, its model card lists them.

    Raises:
        ValueError: the format, dtype or family is unknown; there is no adapter, or it is for another model or a DoRA;
            a module has no known name in the other format; fp16 cannot hold a value; or `output` holds the adapter.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; expected one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; expected one of {', '.join(DTYPES)}.")
    output = Path(output).expanduser()
    if output.suffix == ".safetensors" or output.is_file():
        raise ValueError(f"output={str(output)!r} is a file; give a folder: the file names are fixed.")
    adapter = read_adapter(folder, "folder")
    adapter, denoisers = fitting(adapter, model)
    if format in ("comfyui", "original"):
        files = _original_files(adapter, format, model, denoisers)
    else:
        if format == "diffusers" and isinstance(model, DiffusionPipeline) and not has_lora_loader(model):
            raise ValueError(f"format={format!r}: {type(model).__name__} has no LoRA loader in diffusers; use 'peft'.")
        files = _layout_files(adapter, format)
        source = Path(folder).expanduser()
        own = {path.resolve() for path in (source, *source.glob("*"), *source.glob("*/*"))}
        for path in files:
            if (output / path).resolve() in own:
                raise ValueError(
                    f"output={str(output)!r} holds the adapter itself in {path!r}; choose another folder."
                )
    files = {
        path: ({key: _cast(tensor, dtype, key) for key, tensor in state.items()}, config)
        for path, (state, config) in files.items()
    }
    written = []
    for path, (state, config) in files.items():
        if format == "peft":
            written += write_peft_layout(output / Path(path).parent, state, config)
        else:
            metadata = {"format": "pt"} | ({} if config is None else {"lora_adapter_metadata": json.dumps(config)})
            written.append(atomically(output / path, lambda file, s=state, m=metadata: file.write(save(s, m))))
    add_listed(output, [path.relative_to(output).as_posix() for path in written])
    describe_exports(output)
    return written


def fitting(adapter: SavedAdapter, model: DiffusionPipeline | nn.Module) -> tuple[SavedAdapter, dict[str, nn.Module]]:
    """Return the adapter keyed by denoiser name, and the matching denoisers of `model`, a pipeline or a denoiser;
    raise a ValueError if they do not fit."""
    if isinstance(model, DiffusionPipeline):
        names = [
            name
            for name, part in model.components.items()
            if isinstance(part, nn.Module) and kind_of(name) == "denoiser"
        ]
        adapter = adapter.on(names, None)
        denoisers = {name: getattr(model, name) for name in adapter.states}
    else:
        if "" in adapter.states:  # a peft folder does not name the denoiser
            adapter = adapter.on(["transformer"], None)
        denoisers = dict.fromkeys(adapter.states, model) if isinstance(model, nn.Module) else {}
    for name, denoiser in denoisers.items():
        check_fits(adapter, name, denoiser)
    return adapter, denoisers


def _layout_files(adapter: SavedAdapter, format: str) -> dict[str, tuple[dict[str, Tensor], dict]]:
    """Return {path: (tensors, config)} in diffusers' or peft's layout."""
    files = {}
    for name, state in adapter.states.items():
        config = config_dict(adapter.configs[name])
        if format == "peft":
            files[f"{name}/adapter_model.safetensors"] = state, config
            continue
        second = name == "transformer_2"  # diffusers loads it from a file with the first one's keys
        key = "transformer" if second else name
        tensors, options = files.setdefault(f"{name}/{LORA_FILE}" if second else LORA_FILE, ({}, {}))
        tensors |= {f"{key}.{module}": tensor for module, tensor in state.items()}
        options |= {f"{key}.{option}": value for option, value in config.items()}
    return files


def _original_files(adapter: SavedAdapter, format: str, model: Any, denoisers: dict[str, nn.Module]) -> dict:
    """Return {path: (tensors, None)} with the names of the original or of ComfyUI."""
    experts = "transformer_2" in adapter.states or getattr(model, "transformer_2", None) is not None
    files = {}
    for name in adapter.states:
        family = _family(adapter, name, model, denoisers.get(name))
        state = original_state(adapter, name, family, comfyui=format == "comfyui")
        files[f"{format}_lora{_EXPERTS.get(name, '') if experts else ''}.safetensors"] = state, None
    return files


def _family(adapter: SavedAdapter, name: str, model: Any, denoiser: nn.Module | None) -> str:
    """Return a denoiser's family name; raise a ValueError if it is unknown or the file records another."""
    by_class = {cls: family for family, content in FAMILIES.items() for cls in content.classes}
    noted = (adapter.configs[name].auto_mapping or {}).get("base_model_class")
    if denoiser is not None:
        classes = [cls.__name__ for cls in type(denoiser).__mro__]
        given: Any = next((cls for cls in classes if cls in by_class), classes[0])
    else:
        given = model if model is not None else noted
    family = given if given in FAMILIES else by_class.get(given)
    if family is None:
        why = (
            f"model={given!r} is not a known family"
            if given is not None
            else (f"folder={adapter.source!r} does not record which model it adapts; set model=")
        )
        raise ValueError(
            f"{why}; known families are {', '.join(FAMILIES)}; the formats 'diffusers' and 'peft' work for any model."
        )
    if noted is not None and by_class.get(noted) != family:
        raise ValueError(f"folder={adapter.source!r} adapts a {noted}, which is not of the family {family!r}.")
    return family


def original_state(adapter: SavedAdapter, name: str, family: str, comfyui: bool) -> dict[str, Tensor]:
    """Return a denoiser's LoRA with the original's or ComfyUI's weight names, in fp32; see `export_adapter`."""
    content = FAMILIES[family]
    parts: dict[str, list[tuple[str, Part]]] = {}
    for module in sorted(adapter.configs[name].target_modules):
        part = content.part(module, comfyui)
        if part is None:
            raise ValueError(
                f"folder={adapter.source!r} adapts {module!r}, which has no known name in "
                f"{'ComfyUI' if comfyui else 'the original'} for the family {family!r}: check the "
                "family, use format 'diffusers' or merge the adapter into the base (merge_adapter)."
            )
        parts.setdefault(part.module, []).append((module, part))
    prefix, suffix = ("diffusion_model.", ".weight") if comfyui else ("", content.weight)
    state = {}
    for original, fused in parts.items():
        a, b = _fused(adapter, name, fused)
        state[f"{prefix}{original}.lora_A{suffix}"], state[f"{prefix}{original}.lora_B{suffix}"] = a, b
        if comfyui and content.alpha is not None and re.fullmatch(content.alpha, original):
            state[f"{prefix}{original}.alpha"] = torch.tensor(float(len(a)))
    return state


def _fused(adapter: SavedAdapter, name: str, fused: list[tuple[str, Part]]) -> tuple[Tensor, Tensor]:
    """Combine the LoRAs of diffusers' modules that are rows of one original weight into one LoRA (A, B)."""
    state, downs, ups = adapter.states[name], [], []
    for module, part in sorted(fused, key=lambda pair: pair[1].chunks):
        up = adapter.scale(name, module) * state[f"{module}.lora_B.weight"]
        rows = up.shape[0] // len(part.chunks)
        whole = up.new_zeros(part.of, rows, up.shape[1])
        whole[list(part.chunks)] = up.unflatten(0, (len(part.chunks), rows))
        downs.append(state[f"{module}.lora_A.weight"])
        ups.append(whole.flatten(0, 1))
    sizes = {(down.shape[1], up.shape[0]) for down, up in zip(downs, ups)}
    if len(sizes) > 1:
        raise ValueError(
            f"folder={adapter.source!r}: {', '.join(m for m, _ in fused)} do not have the sizes of one "
            "projection of the original; the adapter is for another model."
        )
    return torch.cat(downs), torch.cat(ups, dim=1)


def _cast(tensor: Tensor, dtype: str, key: str) -> Tensor:
    if key.endswith(".alpha"):  # bf16 cannot represent every rank above 256
        return tensor
    cast = tensor.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(cast).all():
        largest = float(tensor.abs().max())
        raise ValueError(f"dtype={dtype!r} cannot hold {largest:.3g}, a value of {key!r}; use 'bf16' or 'fp32'.")
    return cast
