"""Save and load adapters in the layout that plain diffusers loads, or in peft's."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapters import adapted_denoisers
from .saved_adapter import LORA_FILE, PEFT_PREFIX


def has_lora_loader(pipeline: DiffusionPipeline) -> bool:
    """Return whether plain diffusers can load LoRA adapters into this pipeline's denoisers."""
    return hasattr(pipeline, "save_lora_weights") and all(
        name in pipeline._lora_loadable_modules and hasattr(component, "load_lora_adapter")
        for name, component in adapted_denoisers(pipeline).items()
    )


def _has_own_layers(pipeline: DiffusionPipeline, name: str) -> bool:
    """Return whether `save_lora_weights` writes this denoiser's layers under its own name.

    It does not for Wan 2.2's second expert, which `load_lora_weights(..., load_into_transformer_2=True)` loads from a
    separate file that is written as if for the first expert.
    """
    return f"{name}_lora_layers" in inspect.signature(pipeline.save_lora_weights).parameters


def save_lora(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> list[Path]:
    """Save the adapters of a pipeline.

    Pipelines with a LoRA loader get diffusers' layout, `pytorch_lora_weights.safetensors` with the adapter's
    metadata, which `pipe.load_lora_weights(folder)` reads. A second expert (Wan 2.2) gets a file of the same name in
    the subfolder `transformer_2`, which `pipe.load_lora_weights(folder, load_into_transformer_2=True,
    weight_name="transformer_2/pytorch_lora_weights.safetensors")` reads (do not use `subfolder=`: diffusers prefers a
    file of that name in the folder itself). Other pipelines get peft's layout in one subfolder per denoiser
    (`adapter_model.safetensors`, `adapter_config.json`), which `load_lora` and
    `PeftModel.from_pretrained(pipe.transformer, folder, subfolder="transformer")` read.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapted = adapted_denoisers(pipeline)
    states = {
        name: {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(d).items()}
        for name, d in adapted.items()
    }
    configs = {
        name: config_dict(vars(d)["peft_config"]["default"]) | {"auto_mapping": _class_note(d)}
        for name, d in adapted.items()
    }
    files = []
    if has_lora_loader(pipeline):
        together = [name for name in adapted if _has_own_layers(pipeline, name)]
        parts = [(folder, {name: name for name in together})] if together else []
        parts += [(folder / name, {pipeline.transformer_name: name}) for name in adapted if name not in together]
        accepted = inspect.signature(pipeline.save_lora_weights).parameters
        for place, names in parts:
            layers = {f"{key}_lora_layers": states[name] for key, name in names.items()}
            metadata = {f"{key}_lora_adapter_metadata": configs[name] for key, name in names.items()}
            pipeline.save_lora_weights(place, **layers, **{k: v for k, v in metadata.items() if k in accepted})
            files.append(place / LORA_FILE)
        readable_by_others(files)
        return files
    for name, state in states.items():
        files += write_peft_layout(folder / name, state, configs[name])
    return files


def write_peft_layout(folder: Path, state: dict[str, Tensor], config: dict) -> list[Path]:
    """Save one denoiser's adapter as peft's `save_pretrained` does; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, options = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({f"{PEFT_PREFIX}{key}": tensor for key, tensor in state.items()}, weights)
    options.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    readable_by_others([weights, options])
    return [weights, options]


def config_dict(config: LoraConfig) -> dict:
    """Return a config as a JSON-compatible dict."""
    return json.loads(json.dumps(config.to_dict(), default=_plain))


def _class_note(denoiser: nn.Module) -> dict[str, str]:
    """Return peft's `auto_mapping` entry for the diffusers class that is adapted."""
    cls = next(c for c in type(denoiser).__mro__ if c.__module__.startswith("diffusers."))  # FSDP2 subclasses it
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def readable_by_others(files: list[Path]) -> None:
    """Give files the read and write permissions of their folder: safetensors writes them for the owner alone."""
    for path in files:
        path.chmod(path.parent.stat().st_mode & 0o666)


def _plain(value: Any) -> Any:
    """Convert a value of a peft config for JSON: a set to a sorted list, anything else to its value or name."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))


def load_lora(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Load adapters that `save_lora` wrote into a pipeline without adapters."""
    folder = Path(folder)
    beside = [name for name in pipeline.components if (folder / name / LORA_FILE).exists()]
    for name in beside:
        pipeline.load_lora_weights(folder, weight_name=f"{name}/{LORA_FILE}", **{f"load_into_{name}": True})
    if (folder / LORA_FILE).exists():
        pipeline.load_lora_weights(folder)
    elif not beside:
        _load_peft_layout(pipeline, folder)


def _load_peft_layout(pipeline: DiffusionPipeline, folder: Path) -> None:
    found = [folder / name for name in pipeline.components if (folder / name / "adapter_config.json").exists()]
    if not found:
        raise ValueError(f"{folder} holds no adapter: no {LORA_FILE} and no */adapter_config.json.")
    for path in found:
        denoiser = getattr(pipeline, path.name)
        config = LoraConfig(**json.loads((path / "adapter_config.json").read_text(encoding="utf-8")))
        inject_adapter_in_model(config, denoiser)
        _strict(set_peft_model_state_dict(denoiser, _peft_state(path)), path)


def load_lora_state(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Copy a saved adapter's weights into the pipeline's adapters, to resume training.

    Raises:
        ValueError: the saved adapter has other modules or shapes, so it belongs to another model or LoRA config.
    """
    folder = Path(folder)
    for name, denoiser in adapted_denoisers(pipeline).items():
        own = get_peft_model_state_dict(denoiser)
        state = saved_state(pipeline, folder, name)
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(
                f"the adapter in {folder} does not fit {name} of this model: {len(wrong)} tensors are missing, extra "
                f"or have another shape, e.g. {wrong[0]!r}. Resume with the model and the LoRA settings of that run."
            )
        _strict(set_peft_model_state_dict(denoiser, state), folder)


def saved_state(pipeline: DiffusionPipeline, folder: Path, name: str) -> dict[str, Tensor]:
    """Return a denoiser's saved adapter with peft's tensor names; empty if that run adapted only other denoisers."""
    if not has_lora_loader(pipeline):
        return _peft_state(folder / name)
    file, prefix = folder / LORA_FILE, f"{name}."
    if not _has_own_layers(pipeline, name):
        file, prefix = folder / name / LORA_FILE, f"{pipeline.transformer_name}."
    if not file.exists():  # that run adapted the other expert
        return {}
    return {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}


def _peft_state(folder: Path) -> dict[str, Tensor]:
    return {k.removeprefix(PEFT_PREFIX): v for k, v in load_file(folder / "adapter_model.safetensors").items()}


def _strict(result: Any, folder: Path) -> None:
    if result is not None and result.unexpected_keys:
        raise ValueError(f"{folder} holds weights that the model does not have: {result.unexpected_keys[:3]}.")
