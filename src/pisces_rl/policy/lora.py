"""LoRA in, LoRA out: adapters on a pipeline's denoisers, saved so that plain diffusers loads them."""

import contextlib
import copy
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .execution import plain_blocks, uncompile_blocks
from .guider import guided
from .offload import device_of
from .products import plain_products, unfuse_products

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_PREFIX = "base_model.model."  # without it PeftModel.from_pretrained loads nothing, with only a warning
# Attention and feed-forward projections of the denoising blocks, by their diffusers names.
ATTENTION = (
    r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
    r"|to_query|to_key|to_value|attention\.out_layer)"
)
# Sana-Video's are convolutions of size 1.
FEED_FORWARD = r"(net\.0\.proj|net\.2|feed_forward\.(in_layer|out_layer)|conv_inverted|conv_point)"
BLOCKS = r"(blocks|(single_|temporal_|visual_)?transformer_blocks|down_blocks|mid_block|up_blocks)"
NOT_AUDIO = r"(?!.*\.(audio_attn\d|audio_ff|video_to_audio_attn)\.)"  # rewards see the video: audio stays the base's
DEFAULT_TARGETS = rf"{NOT_AUDIO}{BLOCKS}\..*({ATTENTION}|{FEED_FORWARD})"
# What a block of two streams computes for the text stream alone.
TEXT_OUTPUT = r"(.*\.)?(add_q_proj|to_add_out|(ff_context|txt_ff|txt_mlp)\..*)"


def default_lora_config(r: int = 16, lora_alpha: int | None = None, target_modules=None) -> LoraConfig:
    """LoRA on every attention and feed-forward projection of the denoising blocks; alpha = r, no dropout.

    The pattern is anchored to the blocks, so that token refiners and pooled-text attention stay untouched (a suffix
    such as `to_q` matches those too).
    """
    return LoraConfig(r=r, lora_alpha=lora_alpha or r, lora_dropout=0.0, bias="none",
                      target_modules=target_modules or DEFAULT_TARGETS)


def matched_modules(denoiser: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear and convolutional modules that the config's `target_modules` selects."""
    targets = config.target_modules
    candidates = [name for name, module in denoiser.named_modules()
                  if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
                  and not _discarded(denoiser, name)]
    if targets == "all-linear":
        return [n for n in candidates if isinstance(denoiser.get_submodule(n), nn.Linear)]
    if isinstance(targets, str):
        return [name for name in candidates if re.fullmatch(targets, name)]
    return [name for name in candidates if any(name == t or name.endswith(f".{t}") for t in targets or ())]


def _discarded(denoiser: nn.Module, name: str) -> bool:
    """Text outputs that are thrown away, where an adapter never learns: of attention without a text output (the last
    block of Mochi), or of the last block where no single-stream block follows that reads the text (HunyuanVideo 1.5,
    EasyAnimate, Qwen-Image)."""
    parent, _, child = name.rpartition(".")
    if child == "add_q_proj" and getattr(denoiser.get_submodule(parent), "to_add_out", None) is None:
        return True
    inside = re.fullmatch(rf"(\w*blocks)\.(\d+)\.{TEXT_OUTPUT}", name)
    if inside is None or int(inside[2]) + 1 < len(denoiser.get_submodule(inside[1])):
        return False
    return not len(getattr(denoiser, "single_transformer_blocks", ()))


def add_lora(denoisers: dict[str, nn.Module], config: LoraConfig, only: Sequence[str] | None = None) -> dict[str, int]:
    """Freeze the denoisers and add one trainable fp32 adapter to each.

    Args:
        denoisers: {name: module}.
        config: LoRA rank, targets and scale.
        only: names of the denoisers that get an adapter, e.g. ["transformer_2"] for the low-noise expert of Wan 2.2;
            None: all. An adapter gets gradients only from trained steps at which the pipeline calls its denoiser.

    Returns:
        {denoiser: number of adapted modules}.

    Raises:
        ValueError: a target matches nothing, the config asks for dropout or is not made for denoisers, or `only`
            names none or something else than denoisers.
    """
    if only is not None and (isinstance(only, str) or not only or set(only) - set(denoisers)):
        raise ValueError(
            f"lora_denoisers={only!r}: name one or more of this pipeline's denoisers, {sorted(denoisers)}, in a list; "
            "leave it unset for all."
        )
    for denoiser in denoisers.values():
        denoiser.requires_grad_(False)
    if only is not None:
        denoisers = {name: denoiser for name, denoiser in denoisers.items() if name in only}
    if config.lora_dropout:
        raise ValueError(f"lora_dropout={config.lora_dropout}: dropout makes log-probs irreproducible; set it to 0.")
    if config.task_type is not None:
        raise ValueError(f"task_type={config.task_type!r} is for language models; leave it None for a denoiser.")
    counts = {}
    for name, denoiser in denoisers.items():
        chosen = matched_modules(denoiser, config)
        unmatched = [] if chosen else [config.target_modules]
        if not isinstance(config.target_modules, str):
            unmatched = [t for t in config.target_modules or ()
                         if not any(n == t or n.endswith(f".{t}") for n in chosen)]
        if unmatched:
            raise ValueError(
                f"LoRA target {unmatched} matches no module of {name} ({type(denoiser).__name__}). Its projections "
                f"are named like {_examples(denoiser)}; choose target_modules among them, or leave the default."
            )
        own = copy.copy(config)
        own.target_modules = set(chosen)
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(own)
        else:
            inject_adapter_in_model(own, denoiser)
            denoiser.peft_config = {"default": own}
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        counts[name] = len(chosen)
    return counts


def _examples(denoiser: nn.Module) -> list[str]:
    suffixes = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            suffixes.setdefault(re.sub(r"\.\d+\.", ".N.", name), None)
    return list(suffixes)[:8]


def lora_parameters(denoisers: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The trainable adapter parameters, named `denoiser.module...`, in a fixed order."""
    return {f"{name}.{key}": parameter for name, denoiser in denoisers.items()
            for key, parameter in denoiser.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, the adapters are off: the reference policy, without a second model."""
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def has_lora_loader(pipeline: DiffusionPipeline) -> bool:
    """Whether plain diffusers can load LoRA adapters into this pipeline's denoisers."""
    return hasattr(pipeline, "save_lora_weights") and all(
        name in pipeline._lora_loadable_modules and hasattr(component, "load_lora_adapter")
        for name, component in _adapted(pipeline).items())


def _has_own_layers(pipeline: DiffusionPipeline, name: str) -> bool:
    """Whether `save_lora_weights` writes this denoiser's layers under its own name.

    It does not for the second expert of Wan 2.2, which `load_lora_weights(..., load_into_transformer_2=True)` loads
    from a file of its own, written as if for the first.
    """
    return f"{name}_lora_layers" in inspect.signature(pipeline.save_lora_weights).parameters


def _adapted(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: component for name, component in pipeline.components.items()
            if isinstance(component, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in component.modules())}


def save_lora(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> list[Path]:
    """Write the adapters of a pipeline.

    Pipelines with a LoRA loader get diffusers' layout, `pytorch_lora_weights.safetensors` with the adapter's
    metadata, which `pipe.load_lora_weights(folder)` reads; a second expert (Wan 2.2) gets a file of the same name in
    the subfolder `transformer_2`, which `pipe.load_lora_weights(folder, load_into_transformer_2=True,
    weight_name="transformer_2/pytorch_lora_weights.safetensors")` reads (not with `subfolder=`: a file of that name
    beside it would win). The others get peft's layout in one subfolder a denoiser
    (`adapter_model.safetensors`, `adapter_config.json`), which `load_lora` here and
    `PeftModel.from_pretrained(pipe.transformer, folder, subfolder="transformer")` read.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapted = _adapted(pipeline)
    states = {name: {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(d).items()}
              for name, d in adapted.items()}
    configs = {name: json.loads(json.dumps(d.peft_config["default"].to_dict(), default=_plain))
               for name, d in adapted.items()}
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
        return files
    for name, state in states.items():
        (folder / name).mkdir(exist_ok=True)
        save_file({f"{PEFT_PREFIX}{k}": v for k, v in state.items()}, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps(configs[name], indent=2, sort_keys=True))
        files += [folder / name / "adapter_model.safetensors", folder / name / "adapter_config.json"]
    return files


def _plain(value):
    """JSON for what peft configs hold: sets as sorted lists, everything else by its value or name."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))


def load_lora(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Load what `save_lora` wrote into a pipeline without adapters."""
    folder = Path(folder)
    beside = [name for name in pipeline.components if (folder / name / LORA_FILE).exists()]
    for name in beside:
        pipeline.load_lora_weights(folder, weight_name=f"{name}/{LORA_FILE}", **{f"load_into_{name}": True})
    if (folder / LORA_FILE).exists():
        pipeline.load_lora_weights(folder)
    elif not beside:
        _load_peft_layout(pipeline, folder)


def _load_peft_layout(pipeline: DiffusionPipeline, folder: Path) -> None:
    found = [path.parent for path in folder.glob("*/adapter_config.json")]
    if not found:
        raise ValueError(f"{folder} holds no adapter: no {LORA_FILE}, no */adapter_config.json.")
    for path in found:
        denoiser = getattr(pipeline, path.name)
        config = LoraConfig(**json.loads((path / "adapter_config.json").read_text()))
        inject_adapter_in_model(config, denoiser)
        _strict(set_peft_model_state_dict(denoiser, _peft_state(path)), path)


def load_lora_state(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Copy a saved adapter's weights into the adapters the pipeline already has (to resume training).

    Raises:
        ValueError: the saved adapter has other modules or shapes, so it belongs to another model or LoRA config.
    """
    folder = Path(folder)
    for name, denoiser in _adapted(pipeline).items():
        own = get_peft_model_state_dict(denoiser)
        state = _saved_state(pipeline, folder, name)
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(
                f"the adapter in {folder} does not fit {name} of this model: {len(wrong)} tensors are missing, extra "
                f"or of another shape, e.g. {wrong[0]!r}. Resume with the model and the LoRA settings of that run."
            )
        _strict(set_peft_model_state_dict(denoiser, state), folder)


def _saved_state(pipeline: DiffusionPipeline, folder: Path, name: str) -> dict[str, torch.Tensor]:
    if not has_lora_loader(pipeline):
        return _peft_state(folder / name)
    file, prefix = folder / LORA_FILE, f"{name}."
    if not _has_own_layers(pipeline, name):
        file, prefix = folder / name / LORA_FILE, f"{pipeline.transformer_name}."
    if not file.exists():  # that run adapted the other expert
        return {}
    return {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}


def _peft_state(folder: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix(PEFT_PREFIX): v for k, v in load_file(folder / "adapter_model.safetensors").items()}


def _strict(result, folder: Path) -> None:
    if result is not None and result.unexpected_keys:
        raise ValueError(f"{folder} holds weights the model has no place for: {result.unexpected_keys[:3]}.")


def check_saved_weights(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Read a saved adapter back and compare it with the pipeline's own: a check that runs no model.

    Raises:
        RuntimeError: a tensor is missing, extra, or not equal to the bit.
    """
    folder = Path(folder)
    for name, denoiser in _adapted(pipeline).items():
        own, state = get_peft_model_state_dict(denoiser), _saved_state(pipeline, folder, name)
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if not torch.equal(own[k].cpu(), state[k])]
        if wrong:
            raise RuntimeError(
                f"the adapter saved in {folder} is not that of {name}: {len(wrong)} tensors are missing, extra or "
                f"differ, e.g. {wrong[0]!r}. Look at the disk; the checkpoints are whole."
            )


def without_adapters(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A fresh pipeline of the same class on the same base weights (shared, not copied), with no adapter."""
    fresh = copy.copy(pipeline)  # with the attributes that users set, such as prompt templates
    for name, component in _adapted(pipeline).items():
        shared = {id(t): t for t in [*component.parameters(), *component.buffers()]}
        component = copy.deepcopy(component, shared)
        for path, module in list(component.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = path.rpartition(".")
                setattr(component.get_submodule(parent), child, module.get_base_layer())
        uncompile_blocks(component)
        unfuse_products(component)
        vars(component).pop("peft_config", None)
        component._hf_peft_config_loaded = False
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
        RuntimeError: the reloaded adapter gives other videos.
    """
    fresh = without_adapters(pipeline)
    load_lora(fresh, folder)
    rounded = {}  # diffusers loads an adapter in the dtype of the base: that rounding is no difference of the file
    for key, denoiser in _adapted(fresh).items():
        for name, parameter in denoiser.named_parameters():
            if "lora_" in name:  # beside a weight that is offloaded they were made on the CPU
                parameter.data = parameter.data.to(device_of(denoiser))
                rounded[key] = parameter.dtype
    trained = {p: p.data for key, denoiser in _adapted(pipeline).items() if key in rounded
               for name, p in denoiser.named_parameters() if "lora_" in name}  # fmt: skip
    for key in rounded:
        for parameter in _adapted(pipeline)[key].parameters():
            if parameter in trained:
                parameter.data = parameter.data.to(rounded[key])
    try:
        latents = [_latents(pipe, call) for pipe in (pipeline, fresh)]
    finally:
        for parameter, data in trained.items():
            parameter.data = data
    difference = float((latents[0] - latents[1]).abs().max() / latents[0].abs().max().clamp(min=1e-8))
    if not difference <= tolerance:
        raise RuntimeError(
            f"the adapter saved in {folder} does not reproduce the trained model: latents differ by {difference:.2g} "
            f"(allowed {tolerance:g}). The files were kept; please report this with the pipeline's class name."
        )
    return difference


def _latents(pipe: DiffusionPipeline, call: dict) -> Tensor:
    """Of one call of a pipeline, without compiler and fused products, whose rounding is no difference of adapters."""
    bar = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**(bar or {}) | {"disable": True})
    with contextlib.ExitStack() as plainly, guided(pipe, call) as arguments:
        for denoiser in _adapted(pipe).values():
            plainly.enter_context(plain_blocks(denoiser))
            plainly.enter_context(plain_products(denoiser))
        output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    if bar is None:
        del pipe._progress_bar_config
    else:
        pipe._progress_bar_config = bar
    return output[0].float()
