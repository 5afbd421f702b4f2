"""Add LoRA adapters to a pipeline's denoisers, choose their modules, and set or disable them."""

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..sharded.parts import held, held_values
from .options import check_lora_config
from .saved_adapter import SavedAdapter

# Attention and feed-forward projections of the denoising blocks, by their diffusers names.
ATTENTION = (
    r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
    r"|to_query|to_key|to_value|attention\.out_layer)"
)
# Sana-Video's are convolutions of size 1.
FEED_FORWARD = r"(net\.0\.proj|net\.2|feed_forward\.(in_layer|out_layer)|conv_inverted|conv_point)"
BLOCKS = r"(blocks|(single_|temporal_|visual_)?transformer_blocks|down_blocks|mid_block|up_blocks)"
NOT_AUDIO = (
    r"(?!.*\.(audio_attn\d|audio_ff|video_to_audio_attn)\.)"  # rewards see only the video: audio is not trained
)
PROJECTIONS = rf"{BLOCKS}\..*({ATTENTION}|{FEED_FORWARD})"
DEFAULT_TARGETS = NOT_AUDIO + PROJECTIONS
# These, and those of single-stream blocks, whose attention and feed-forward share an output projection.
PRODUCTS = rf"{PROJECTIONS}|{BLOCKS}\..*(proj_mlp|proj_out)"
# Modules of a two-stream block that only affect the text stream.
TEXT_OUTPUT = r"(.*\.)?(add_q_proj|to_add_out|(ff_context|txt_ff|txt_mlp)\..*)"


def default_lora_config(
    r: int = 16, lora_alpha: int | None = None, target_modules: list[str] | str | None = None
) -> LoraConfig:
    """Return a LoRA config for every attention and feed-forward projection of the denoising blocks; no dropout.

    The pattern is anchored to the blocks, so that token refiners and pooled-text attention stay untouched (a suffix
    such as `to_q` would match those too).

    Args:
        r: rank.
        lora_alpha: None means r.
        target_modules: modules to adapt instead, as in `LoraConfig`.
    """
    if target_modules == ["all-linear"]:  # from a command line
        target_modules = "all-linear"
    return LoraConfig(
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=DEFAULT_TARGETS if target_modules is None else target_modules,
    )


def matched_modules(denoiser: nn.Module, config: LoraConfig) -> list[str]:
    """Return the linear and convolutional modules that a config selects: those in `target_modules` (None: those of
    `default_lora_config`) and not in `exclude_modules`."""
    targets = DEFAULT_TARGETS if config.target_modules is None else config.target_modules
    candidates = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and not _discarded(denoiser, name)
        and not _excluded(config, name)
    ]
    if targets == "all-linear":
        return [n for n in candidates if isinstance(denoiser.get_submodule(n), nn.Linear)]
    if isinstance(targets, str):
        return [name for name in candidates if re.fullmatch(targets, name)]
    return [name for name in candidates if any(name == t or name.endswith(f".{t}") for t in targets or ())]


def _discarded(denoiser: nn.Module, name: str) -> bool:
    """Return whether a module's output is a text output that is never used, so that an adapter there never learns.

    That is so in attention without a text output (Mochi's last block), and in the last block if no single-stream block
    follows that reads the text (HunyuanVideo 1.5, EasyAnimate, Qwen-Image).
    """
    parent, _, child = name.rpartition(".")
    if child == "add_q_proj" and getattr(denoiser.get_submodule(parent), "to_add_out", None) is None:
        return True
    inside = re.fullmatch(rf"(\w*blocks)\.(\d+)\.{TEXT_OUTPUT}", name)
    if inside is None or int(inside[2]) + 1 < len([*denoiser.get_submodule(inside[1]).children()]):
        return False
    return not len(getattr(denoiser, "single_transformer_blocks", ()))


def add_lora(
    denoisers: dict[str, nn.Module],
    config: LoraConfig | None = None,
    only: Sequence[str] | None = None,
    start: SavedAdapter | None = None,
) -> dict[str, int]:
    """Freeze the denoisers and add one trainable fp32 adapter to each.

    Args:
        denoisers: {name: module}.
        config: LoRA rank, targets and scale; None means those of `start`, else those of `default_lora_config`.
        only: names of the denoisers that get an adapter, e.g. ["transformer_2"] for the low-noise expert of Wan 2.2;
            None means all. An adapter gets gradients only from trained steps at which the pipeline calls its denoiser.
        start: a saved adapter whose rank, scale, modules and values to use; None starts at the base model.

    Returns:
        {denoiser: number of adapted modules}.

    Raises:
        ValueError: a target matches nothing, the config has an unsupported option (see `check_lora_config`) or
            contradicts `start`, `start` does not fit, a denoiser has an adapter, or `only` is empty or names
            something other than a denoiser.
    """
    names = chosen_denoisers(denoisers, only)
    check_no_adapters(denoisers)
    if start is None:
        config = config or default_lora_config()
        check_lora_config(config)
        configs = {name: _on(name, denoisers[name], config) for name in names}
    else:
        start.check_asked(config)
        start = start.on(list(denoisers), only)
        configs = {name: _fitting(start, name, denoisers[name], config) for name in start.configs}
    for denoiser in denoisers.values():
        denoiser.requires_grad_(False)
    for name, own in configs.items():
        denoiser = denoisers[name]
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(own)
        else:
            inject_adapter_in_model(own, denoiser)
            denoiser.peft_config = {"default": own}  # type: ignore[assignment]
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        if start is not None:
            set_peft_model_state_dict(denoiser, start.states[name])
    return {name: sum(isinstance(m, BaseTunerLayer) for m in denoisers[name].modules()) for name in configs}


def chosen_denoisers(denoisers: dict[str, nn.Module], only: Sequence[str] | None) -> list[str]:
    """Return the names of the denoisers in `lora_denoisers`; a ValueError if it is empty or names anything else."""
    if only is not None and (isinstance(only, str) or not only or set(only) - set(denoisers)):
        raise ValueError(
            f"lora_denoisers={only!r}: name one or more of this pipeline's denoisers, {sorted(denoisers)}, in a list; "
            "leave it unset for all."
        )
    return [name for name in denoisers if only is None or name in only]


def check_no_adapters(components: dict[str, nn.Module]) -> None:
    """Raise a ValueError if a component of a pipeline already has adapters, active or not, or is sharded."""
    for name, component in components.items():
        layers = [m for m in component.modules() if isinstance(m, BaseTunerLayer)]
        if layers or isinstance(component, PeftModel):
            names = sorted({adapter for layer in layers for adapter in layer._all_available_adapter_names()})
            carried = (
                f"already has the adapter {', '.join(map(repr, names))}"
                if names
                else ("is a PeftModel" if isinstance(component, PeftModel) else "has LoRA layers, though empty ones")
            )
            fix = "load the pipeline again"
            if isinstance(component, PeftModel):
                fix = f"merge it into the base first with `pipe.{name} = pipe.{name}.merge_and_unload()`; or {fix}"
            elif isinstance(component, PeftAdapterMixin):  # pipe.fuse_lora() takes one expert, pipe.unload_... both
                fix = (
                    f"merge it into the base first with `pipe.{name}.fuse_lora(); pipe.{name}.unload_lora()` (to "
                    f"drop it, only call the second); or {fix}"
                )
            raise ValueError(
                f"{name} {carried}, which this run would neither train nor save: {fix}. To train a saved adapter "
                "further, pass continue_from=FOLDER in the config."
            )
        if isinstance(component, FSDPModule):
            raise ValueError(
                f"{name} is still sharded over several ranks by an earlier run: load the pipeline again for this one."
            )


def check_fits(start: SavedAdapter, name: str, denoiser: nn.Module) -> None:
    """Raise a ValueError if a denoiser lacks a layer that a saved adapter adapts, or has it in another size."""
    modules = dict(denoiser.named_modules())
    for module in sorted(start.configs[name].target_modules):
        a, b = (start.states[name][f"{module}.lora_{part}.weight"] for part in "AB")
        sizes = _sizes(modules.get(module))
        if sizes != (a.shape[1], b.shape[0]):
            there = "has no such layer" if sizes is None else f"has one from {sizes[0]} to {sizes[1]} features"
            raise ValueError(
                f"{start.argument}={start.source!r} does not fit {name} of this model: it adapts {module!r} from "
                f"{a.shape[1]} to {b.shape[0]} features, but {type(denoiser).__name__} {there}. Use the model that "
                "it was trained on."
            )


def _fitting(start: SavedAdapter, name: str, denoiser: nn.Module, asked: LoraConfig | None) -> LoraConfig:
    """Return a saved adapter's config; a ValueError if it does not fit the denoiser, or `asked` has other modules."""
    check_fits(start, name, denoiser)
    own = copy.copy(start.configs[name])
    saved = sorted(own.target_modules)
    if asked is not None and asked.target_modules is not None:
        chosen = matched_modules(denoiser, asked)
        if set(chosen) != set(saved):
            other = sorted(set(chosen) ^ set(saved))[0]
            raise ValueError(
                f"peft_config: target_modules select {len(chosen)} modules of {name}, but continue_from="
                f"{start.source!r} adapts {len(saved)}, and they differ in {other!r}. Leave peft_config out, since "
                "rank, alpha and modules come from the file."
            )
    own.target_modules = _exactly(denoiser, saved)  # type: ignore[assignment]  # peft stores lists as sets
    return own


def _sizes(module: Any) -> tuple[int, int] | None:
    """Return the input and output features of a linear or convolutional layer, with or without an adapter."""
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    return None


def _on(name: str, denoiser: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return the config with the full names of the modules that it selects in a denoiser."""
    chosen = matched_modules(denoiser, config)
    targets = config.target_modules
    unmatched = [] if chosen else [targets]
    if targets is not None and not isinstance(targets, str):
        unmatched = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in chosen)]
    if unmatched:
        raise ValueError(
            f"LoRA target {unmatched} matches no module of {name} ({type(denoiser).__name__}). Its projections "
            f"are named like {_examples(denoiser)}; choose target_modules from them, or leave the default."
        )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in chosen):
                raise ValueError(
                    f"peft_config: {option} has {pattern!r}, which matches none of the {len(chosen)} adapted modules "
                    f"of {name}; one of these is {chosen[0]!r}."
                )
    own = copy.copy(config)
    own.target_modules = _exactly(denoiser, chosen)  # type: ignore[assignment]
    own.exclude_modules = None
    return own


def _exactly(denoiser: nn.Module, modules: Sequence[str]) -> set[str] | str:
    """Return a `target_modules` that selects exactly these modules; peft also matches names that end with a target."""
    ends = {
        name
        for name, _ in denoiser.named_modules()
        if name not in modules and any(name.endswith(f".{m}") for m in modules)
    }
    return "|".join(re.escape(m) for m in sorted(modules)) if ends else set(modules)


def _excluded(config: LoraConfig, name: str) -> bool:
    """Return whether `exclude_modules` names a module: by its full name, its suffix, or a pattern."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == e or name.endswith(f".{e}") for e in excluded or ())


def _examples(denoiser: nn.Module) -> list[str]:
    suffixes: dict[str, None] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            suffixes.setdefault(re.sub(r"\.\d+\.", ".N.", name), None)
    return list(suffixes)[:8]


def lora_parameters(denoisers: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, named `denoiser.module...`, in a fixed order."""
    return {
        f"{name}.{key}": parameter
        for name, denoiser in denoisers.items()
        for key, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


@contextlib.contextmanager
def adapter_values(adapter: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Give the adapter other values, such as its initial ones, while the context is open.

    No pending backward may need the adapter's own values.
    """
    own = held_values(adapter)
    try:
        set_adapter(adapter, values)
        yield
    finally:
        set_adapter(adapter, own)


@torch.no_grad()
def set_adapter(adapter: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Set an adapter's parameters, or the parts of them that this process holds, to the values of the same names."""
    for name, parameter in adapter.items():
        held(parameter).copy_(values[name])


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Disable the adapters while the context is open: the reference policy, without a second model."""
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted_denoisers(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the components that have adapters, by name."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in component.modules())
    }
