"""LoRA adapters on a pipeline's denoisers: which modules get one, and switching them off."""

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence

from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

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


def adapted_denoisers(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that hold adapters, by name."""
    return {name: component for name, component in pipeline.components.items()
            if isinstance(component, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in component.modules())}
