"""Read and check a saved adapter to start from, in diffusers' or peft's layout, before any model is loaded."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pipeline.offload import kind_of
from .options import check_lora_config

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_PREFIX = "base_model.model."  # without it PeftModel.from_pretrained loads nothing, with only a warning
_PEFT_FILE, _PEFT_CONFIG, _METADATA = "adapter_model.safetensors", "adapter_config.json", "lora_adapter_metadata"
_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_CONVERT = (
    "Let diffusers convert it: pipe.load_lora_weights(FILE, adapter_name='default'), then "
    "pisces_rl.policy.save_lora(pipe, FOLDER), and continue from FOLDER."
)


@dataclass
class SavedAdapter:
    """One or more denoisers' saved LoRA.

    Attributes:
        source: the folder, file or Hub id it was read from.
        configs: {denoiser: its `LoraConfig`, with the full names of the adapted modules}. The name is "" if a peft
            file does not say which denoiser it adapts.
        states: {denoiser: fp32 tensors with peft's names}.
        argument: name of the argument that gave the source, for messages.
    """

    source: str
    configs: dict[str, LoraConfig]
    states: dict[str, dict[str, Tensor]]
    argument: str = "continue_from"

    def scale(self, name: str, module: str) -> float:
        """Return the scale of B A for a denoiser's module: alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        config = self.configs[name]
        alpha = config.alpha_pattern.get(get_pattern_key([*config.alpha_pattern], module), config.lora_alpha)
        rank = self.states[name][f"{module}.lora_A.weight"].shape[0]
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def delta(self, name: str, module: str) -> Tensor:
        """Return what the adapter adds to a module's weight, scale B A, in fp32 and in the weight's shape."""
        a, b = (self.states[name][f"{module}.lora_{part}.weight"] for part in "AB")
        return self.scale(name, module) * (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    @property
    def digest(self) -> str:
        """SHA-256 of the scales and weights."""
        content = hashlib.sha256()
        for name, state in sorted(self.states.items()):
            config = self.configs[name]
            scale = [config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern]
            content.update(json.dumps([name, scale], sort_keys=True).encode())
            for key, tensor in sorted(state.items()):
                content.update(key.encode() + tensor.numpy().tobytes())
        return content.hexdigest()

    def check_asked(self, config: LoraConfig | str | None) -> None:
        """Raise a ValueError if a `peft_config` contradicts the saved adapter's rank or scale."""
        if config is None:
            return
        for name, saved in self.configs.items():
            for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
                asked, kept = getattr(config, option), getattr(saved, option)
                if asked != kept:
                    raise ValueError(
                        f"peft_config: {option}={asked!r}, but {self.argument}={self.source!r} was saved with "
                        f"{option}={kept!r}{f' for {name}' if name else ''}. Leave peft_config out, "
                        "since rank, alpha and modules come from the file."
                    )

    def on(self, denoisers: list[str], only: Sequence[str] | None) -> "SavedAdapter":
        """Return this adapter under the names of a pipeline's denoisers; a ValueError if they do not match, or if they
        are not `only`."""
        names = list(self.states)
        if names == [""] and len(denoisers) == 1:
            names = denoisers
        if set(names) - set(denoisers):
            raise ValueError(
                f"{self.argument}={self.source!r} adapts {sorted(names) if names != [''] else 'one unnamed model'}, "
                f"but this pipeline's denoisers are {sorted(denoisers)}. A folder in peft's layout has one subfolder "
                "per denoiser, with its name."
            )
        if only is not None and set(only) != set(names):
            raise ValueError(
                f"lora_denoisers={only!r}, but {self.argument}={self.source!r} adapts {sorted(names)}: leave "
                "lora_denoisers unset, since the file says which denoisers have an adapter."
            )
        return SavedAdapter(
            self.source, dict(zip(names, self.configs.values())), dict(zip(names, self.states.values())), self.argument
        )


def read_adapter(source: str | os.PathLike, argument: str = "continue_from") -> SavedAdapter:
    """Read a whole saved adapter, in fp32.

    Args:
        source: a folder that a trainer, `pipe.save_lora_weights` or peft's `save_pretrained` wrote, a safetensors
            file in diffusers' layout, or a Hub id.
        argument: name of the argument that gave the source, for messages.

    Raises:
        ValueError: there is no adapter, it could not be fetched, or it is not a plain LoRA of denoisers.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    path = path if path.exists() else _fetched(source, argument)
    said = f"{argument}={source!r}"
    try:
        parts = _parts(said, path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{said} could not be read: {error}") from error
    return SavedAdapter(
        source,
        {name: config for name, (config, _) in parts.items()},
        {name: state for name, (_, state) in parts.items()},
        argument,
    )


def _fetched(source: str, argument: str) -> Path:
    try:
        return Path(
            snapshot_download(
                source,
                allow_patterns=[
                    LORA_FILE,
                    f"*/{LORA_FILE}",
                    _PEFT_FILE,
                    _PEFT_CONFIG,
                    f"*/{_PEFT_FILE}",
                    f"*/{_PEFT_CONFIG}",
                ],
            )
        )
    except HFValidationError:
        raise ValueError(f"{argument}={source!r} is neither an existing folder or file, nor a Hub id.") from None
    except Exception as error:  # the Hub's client has no common base class
        said = " ".join(str(error).split())
        raise ValueError(
            f"{argument}={source!r} is not a local folder or file, and could not be fetched from the Hub; check the "
            "name, the network (HF_HUB_OFFLINE) and the token, or give a local folder. The Hub's client said: "
            f"{type(error).__name__}: {said}"
        ) from error


def _parts(label: str, path: Path) -> dict[str, tuple[LoraConfig, dict[str, Tensor]]]:
    if path.is_file():
        return _diffusers_file(label, path)
    parts = _diffusers_file(label, path / LORA_FILE) if (path / LORA_FILE).exists() else {}
    for file in sorted(path.glob(f"*/{LORA_FILE}")):  # a second expert, written as if for the first
        if kind_of(file.parent.name) == "denoiser":
            ((config, state),) = _diffusers_file(label, file).values()
            parts[file.parent.name] = config, state
    peft = [] if parts else sorted(path.glob(f"*/{_PEFT_CONFIG}")) or list(path.glob(_PEFT_CONFIG))
    for file in peft:
        parts[file.parent.name if file.parent != path else ""] = _peft_folder(label, file.parent)
    if not parts:
        others = sorted(file.name for file in path.glob("*.safetensors"))
        hint = f" It holds {others}: if one of them is in diffusers' layout, name that file." if others else ""
        raise ValueError(
            f"{label} holds no adapter: no {LORA_FILE} and no {_PEFT_CONFIG}, in it or in a subfolder "
            f"with a denoiser's name.{hint}"
        )
    return parts


def _diffusers_file(label: str, file: Path) -> dict[str, tuple[LoraConfig, dict[str, Tensor]]]:
    """Read tensors DENOISER.MODULE.lora_A.weight, and the options of each denoiser's config from the metadata."""
    tensors, metadata = _tensors(label, file)
    options = json.loads(metadata.get(_METADATA, "{}"))
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        states.setdefault(name, {})[rest] = tensor
    foreign = [name for name in states if kind_of(name) != "denoiser"]
    if foreign:
        raise ValueError(
            f"{label} has tensors of {foreign[0]!r}, such as {next(iter(states[foreign[0]]))!r}. That is not a "
            f"denoiser's name (transformer, unet, ...), so the file adapts something else or has another tool's "
            f"layout. {_CONVERT}"
        )
    return {
        name: (
            _config(
                label,
                {key.removeprefix(f"{name}."): value for key, value in options.items() if key.startswith(f"{name}.")},
                state,
            ),
            state,
        )
        for name, state in states.items()
    }


def _peft_folder(label: str, folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    tensors, _ = _tensors(label, folder / _PEFT_FILE)
    state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    return _config(label, json.loads((folder / _PEFT_CONFIG).read_text(encoding="utf-8")), state), state


def _tensors(label: str, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        names, metadata = list(opened.keys()), opened.metadata() or {}
        wrong = [name for name in names if not _WEIGHT.fullmatch(name)]
        if wrong or not names:
            raise ValueError(f"{label}: {_reason(wrong)}")
        tensors = {name: opened.get_tensor(name).float() for name in names}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{label}: {bad[0]!r} holds NaN or infinity; that adapter is broken.")
    return tensors, metadata


def _reason(wrong: list[str]) -> str:
    if not wrong:
        return "the file holds no tensors."
    name = wrong[0]
    if any("lora_magnitude_vector" in n for n in wrong):
        return (
            "it is a DoRA (lora_magnitude_vector); only plain LoRA (lora_A and lora_B) is supported. Merge it into "
            "the base: pipe.load_lora_weights(...), then fuse_lora() and unload_lora() of each denoiser."
        )
    if any(mark in n for n in wrong for mark in ("lora_down", "lora_up", ".alpha", "lora.down", "lora.up")):
        return f"{name!r} is in the layout of kohya or ComfyUI. {_CONVERT}"
    return (
        f"{name!r} is not a weight of lora_A or lora_B; only plain LoRA is supported. Merge it into the base: "
        "pipe.load_lora_weights(...), then fuse_lora() and unload_lora() of each denoiser."
    )


def _config(label: str, options: dict, state: dict[str, Tensor]) -> LoraConfig:
    """Return a saved adapter's config: options as saved, modules and ranks from its tensors."""
    modules = {_WEIGHT.fullmatch(key)["module"] for key in state}
    ranks = {}
    for module in sorted(modules):
        pair = [state.get(f"{module}.lora_{part}.weight") for part in "AB"]
        if None in [None if t is None else t.ndim for t in pair] or pair[0].shape[0] != pair[1].shape[1]:
            raise ValueError(f"{label}: lora_A and lora_B of {module!r} do not belong together.")
        ranks[module] = pair[0].shape[0]
    if not options:  # alpha is the rank, as when diffusers loads such a file
        most = max(set(ranks.values()), key=list(ranks.values()).count)
        others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != most}
        return LoraConfig(
            r=most, lora_alpha=most, target_modules=sorted(modules), rank_pattern=others, alpha_pattern=dict(others)
        )
    if options.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{label} is a {options['peft_type']} adapter of peft; only LoRA is supported.")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = [name for name, value in options.items() if name not in known and value]
    if unknown:
        raise ValueError(
            f"{label} was saved with {unknown[0]}={options[unknown[0]]!r}, which the installed peft does not "
            "know; install the version that wrote it."
        )
    # drop options that only concern how it was trained; its modules are those of its tensors
    plain = {
        "lora_dropout": 0.0,
        "task_type": None,
        "inference_mode": False,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": modules,
    }
    start = options.get("init_lora_weights", True)
    plain |= {"init_lora_weights": True} if isinstance(start, bool) or start == "orthogonal" else {}
    try:
        config = LoraConfig(**{name: value for name, value in options.items() if name in known} | plain)
        check_lora_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label} is a LoRA that cannot be trained further: {error}") from error
    for module, rank in ranks.items():
        said = config.rank_pattern.get(get_pattern_key([*config.rank_pattern], module), config.r)
        if rank != said:
            raise ValueError(f"{label} says rank {said} for {module!r}, whose tensors have rank {rank}.")
    return config
