"""Save trained denoisers as components that diffusers' `from_pretrained` loads, and load and check them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from ..lora.lora_files import readable_by_others
from ..lora.saved_check import compare_latents, latents_of
from ..pipeline.offload import device_of
from ..sharded.parts import gathered, held, part_of

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model*.safetensors"


def save_components(pipeline: DiffusionPipeline, names: Sequence[str], folder: Path) -> list[Path]:
    """Save each denoiser to its subfolder in its current dtype (fp32 if a run trains it); return the files."""
    files = []
    for name in names:
        place = folder / name
        getattr(pipeline, name).save_pretrained(place)
        config = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # may be a local path
        (place / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files += [path for path in sorted(place.iterdir()) if path.is_file()]
    readable_by_others(files)
    return files


def load_components(pipeline: DiffusionPipeline, names: Sequence[str], folder: Path) -> None:
    """Copy saved weights into the pipeline's denoisers, to resume training.

    Raises:
        ValueError: a component is missing, or its weights have other names or shapes.
    """
    for name in names:
        own, state = getattr(pipeline, name).state_dict(), _saved(folder / name)
        wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
        if wrong:
            raise ValueError(
                f"{folder / name} does not fit {name} of this model: {len(wrong)} tensors are missing, extra or have "
                f"another shape, e.g. {wrong[0]!r}. Resume with the model and the peft_config of that run."
            )
        with torch.no_grad():
            for key, tensor in own.items():
                held(tensor).copy_(part_of(state[key], tensor))


def gathered_component(denoiser: nn.Module, cls: type) -> nn.Module | None:
    """Gather a sharded denoiser into host memory, as an instance of its original class.

    All ranks must call this; tensors are gathered one at a time. The first process of each machine gets the denoiser,
    the others get None.
    """
    state = {key: gathered(held(tensor), tensor) for key, tensor in denoiser.state_dict().items()}
    if any(tensor is None for tensor in state.values()):
        return None
    with init_empty_weights(), torch.random.fork_rng(devices=[]):
        component = cls.from_config(denoiser.config)
    component.load_state_dict({key: tensor.cpu() for key, tensor in state.items()}, assign=True)  # also buffers
    return component.requires_grad_(False)


def _saved(folder: Path) -> dict[str, Tensor]:
    state = {}
    for part in sorted(folder.glob(_WEIGHTS)):
        state |= load_file(part)
    return state


def check_components(
    pipeline: DiffusionPipeline, names: Sequence[str], folder: Path, call: dict, tolerance: float
) -> float:
    """Load the saved components as plain diffusers does, compare their weights, and compare latents sampled with them.

    The trained denoisers are in host memory meanwhile. Arguments, result and errors as in `check_saved_lora`; also a
    RuntimeError if a weight is not bitwise equal.
    """
    trained = {name: getattr(pipeline, name) for name in names}
    devices = {name: device_of(denoiser) for name, denoiser in trained.items()}
    latents = [latents_of(pipeline, trained.values(), call)]
    try:
        for name, denoiser in trained.items():
            denoiser.to("cpu")
            loaded = type(denoiser).from_pretrained(folder, subfolder=name, dtype=next(denoiser.parameters()).dtype)
            _check_equal(name, denoiser.state_dict(), loaded.state_dict(), folder)
            setattr(pipeline, name, loaded.requires_grad_(False).to(devices[name]))
        latents.append(latents_of(pipeline, [], call))
    finally:
        for name, denoiser in trained.items():
            setattr(pipeline, name, denoiser.to(devices[name]))
    return compare_latents(latents, tolerance, "weights", folder)


def check_read_back(pipeline: DiffusionPipeline, names: Sequence[str], folder: Path) -> None:
    """Load the saved components as plain diffusers does, and compare their weights with the pipeline's in host memory.

    Nothing is sampled.

    Raises:
        RuntimeError: a weight is missing, extra or not bitwise equal.
    """
    for name in names:
        own = getattr(pipeline, name)
        loaded = type(own).from_pretrained(folder, subfolder=name, dtype=next(own.parameters()).dtype)
        _check_equal(name, own.state_dict(), loaded.state_dict(), folder)


def _check_equal(name: str, own: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    wrong = sorted(
        set(own) ^ set(saved)
    ) or [  # loading casts to the weights' dtype, which may be narrower than a buffer's
        key for key in own if not torch.equal(own[key].to(saved[key].dtype), saved[key])
    ]
    if wrong:
        raise RuntimeError(
            f"the weights saved in {folder / name} are not those of {name}: {len(wrong)} tensors are missing, extra "
            f"or differ, e.g. {wrong[0]!r}. Check the disk; the checkpoints are intact."
        )
