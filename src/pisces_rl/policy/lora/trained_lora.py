"""Train LoRA adapters."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from .adapters import add_lora
from .lora_files import load_lora_state, save_lora
from .saved_adapter import SavedAdapter
from .saved_check import check_saved_lora, check_saved_weights


class TrainedLoRA:
    """Trains an adapter on each of a pipeline's denoisers; arguments and errors as in `add_lora`.

    Attributes:
        modules: {denoiser: number of adapted modules}.
        components: {}, since no denoiser is saved whole.
    """

    def __init__(
        self,
        denoisers: dict[str, nn.Module],
        config: LoraConfig | None = None,
        only: Sequence[str] | None = None,
        start: SavedAdapter | None = None,
    ):
        self.modules = add_lora(denoisers, config, only, start)
        self.components: dict[str, str] = {}

    @property
    def description(self) -> str:
        return f"LoRA on {self.modules} modules"

    def base_dtype(self, denoisers: dict[str, nn.Module]) -> torch.dtype:
        """Return the dtype of most of the base weights."""
        dtypes = Counter(p.dtype for module in denoisers.values() for p in module.parameters() if not p.requires_grad)
        return dtypes.most_common(1)[0][0]

    def gathered(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Return the pipeline to pass to `save`: this one, since adapters are whole on every rank."""
        return pipeline

    def save(self, pipeline: DiffusionPipeline, folder: str | os.PathLike) -> list[Path]:
        return save_lora(pipeline, folder)

    def load(self, pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
        load_lora_state(pipeline, folder)

    def check_saved(
        self, pipeline: DiffusionPipeline, folder: str | os.PathLike, call: dict, tolerance: float
    ) -> float:
        return check_saved_lora(pipeline, folder, call, tolerance)

    def check_read_back(self, pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
        check_saved_weights(pipeline, folder)
