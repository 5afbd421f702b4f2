"""Pipelines without weights: real classes whose parameters have shapes and dtypes but no values."""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .. import assets

NO_WEIGHTS = "a model folder or Hub id of diffusers with a model_index.json, or one of the architectures given"


def weightless_pipeline(model: str, dtype: torch.dtype, architectures: dict | None = None) -> DiffusionPipeline:
    """Build a pipeline on the meta device, as `from_pretrained(model, dtype=dtype)` would load it.

    Only configuration files are read, or downloaded from the Hub. Tokenizers are replaced by a byte tokenizer.

    Args:
        model: a folder, a built-in model's name or a Hub id.
        dtype: dtype of the weights; modules that a class keeps in fp32 stay in fp32.
        architectures: {model: {"pipeline": class, component: {"class": class, its settings}}}, searched first.

    Raises:
        ValueError: the configuration files do not exist.
    """
    if architectures and model in architectures:
        index = dict(architectures[model])
        made = {
            name: _component(value.pop("class"), value, dtype)
            for name, value in ((n, dict(v)) for n, v in index.items() if isinstance(v, dict))
        }
        extra = {name: value for name, value in index.items() if not isinstance(value, dict) and name != "pipeline"}
        return getattr(diffusers, index["pipeline"])(**made, **extra)
    path = str(assets.asset_path(model)) if model in assets.available() else model
    try:
        index = DiffusionPipeline.load_config(path)
        return _from_index(path, index, dtype)
    except OSError as error:
        known = f" {sorted(architectures)}" if architectures else ""
        raise ValueError(f"model={model!r} must be {NO_WEIGHTS}{known}: {error}") from error


def _from_index(path: str, index: dict, dtype: torch.dtype) -> DiffusionPipeline:
    made = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, (list, tuple)):
            made[name] = value
            continue
        library, cls = value
        if cls is None:
            made[name] = None
        elif "Tokenizer" in cls:
            made[name] = _component(cls, {}, dtype)
        elif library == "diffusers":
            settings = getattr(diffusers, cls).load_config(path, subfolder=name)
            made[name] = _component(cls, settings, dtype)
        elif "ImageProcessor" in cls or "FeatureExtractor" in cls:
            made[name] = None
        else:
            config = (
                transformers.AutoConfig.from_pretrained(os.path.join(path, name))
                if os.path.isdir(path)
                else (transformers.AutoConfig.from_pretrained(path, subfolder=name))
            )
            made[name] = _component(cls, config, dtype)
    return getattr(diffusers, index["_class_name"])(**made)


def _component(name: str, settings: Any, dtype: torch.dtype) -> Any:
    if "Tokenizer" in name:
        return byte_tokenizer(77 if "CLIP" in name else 512)
    if hasattr(diffusers, name) and issubclass(getattr(diffusers, name), ConfigMixin):
        cls = getattr(diffusers, name)
        if not issubclass(cls, nn.Module):
            return cls.from_config(settings)
        with torch.device("meta"):
            module = cls.from_config(settings)
        keep = cls._keep_in_fp32_modules or ()
    else:
        cls = getattr(transformers, name)
        config = settings if not isinstance(settings, dict) else cls.config_class(**settings)
        with torch.device("meta"):
            module = cls(config)
        keep = ()  # in bf16, transformers keeps only its "strict" modules; no video text encoder has any
    for key, parameter in module.named_parameters():
        if not any(part in key.split(".") for part in keep):
            parameter.data = parameter.data.to(dtype)
    return module.requires_grad_(False).eval()


def byte_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Return a byte tokenizer that pads to `length`, so that embeddings have the length of any prompt's."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def replaced_tensors(module: nn.Module, device: str) -> nn.Module:
    """Copy a module with new tensors of the same shapes, strides and dtypes, without their values."""
    new = {id(t): _like(t, device) for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, new)


def _like(tensor: Tensor, device: str) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@contextlib.contextmanager
def silenced_warnings() -> Iterator[None]:
    """Silence warnings of diffusers and transformers about weights."""
    before = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before[0])
        transformers.utils.logging.set_verbosity(before[1])
