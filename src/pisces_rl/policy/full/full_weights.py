"""Full fine-tuning: train all weights of chosen denoisers in fp32, and swap in other values, such as initial ones."""

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..lora.adapters import check_no_adapters, chosen_denoisers
from ..sharded.parts import held
from ..sharded.sharding import is_sharded
from .component_files import check_components, check_read_back, gathered_component, load_components, save_components

#: The `peft_config` that selects full fine-tuning.
FULL = "full"


class FullWeights:
    """Trains all weights of a pipeline's denoisers; the counterpart of `TrainedLoRA`.

    The weights are kept in fp32, so that an optimizer's small steps are not rounded away; a run in bf16 computes under
    autocast. No layers are added.

    Args:
        denoisers: {name: module} of a pipeline.
        only: names of the denoisers to train; the others are frozen. None trains all.

    Attributes:
        modules: {denoiser: number of its modules with weights}.
        components: {denoiser: name of its class}.

    Raises:
        ValueError: weights are quantised or stored in 8 bits, a denoiser has an adapter, or `only` is empty or names
            something other than a denoiser.
    """

    def __init__(self, denoisers: dict[str, nn.Module], only: Sequence[str] | None = None):
        names = chosen_denoisers(denoisers, only)
        check_no_adapters(denoisers)
        for denoiser in denoisers.values():
            denoiser.requires_grad_(False)
        self.classes = {name: type(denoisers[name]) for name in names}  # sharding changes the class
        self.components = {name: cls.__name__ for name, cls in self.classes.items()}
        self.modules: dict[str, int] = {}
        self.dtypes: Counter[torch.dtype] = Counter()
        for name in names:
            self.modules[name] = self._train(name, denoisers[name])

    def _train(self, name: str, denoiser: nn.Module) -> int:
        for key, tensor in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
            trained = isinstance(tensor, nn.Parameter)
            if trained and (
                not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or type(tensor) is not nn.Parameter
            ):
                raise ValueError(
                    f"peft_config={FULL!r}: {key} of {name} is a {type(tensor).__name__} of {tensor.dtype}, quantised "
                    "or stored in 8 bits, so it cannot be trained. Load the model in bfloat16 or float32, or train a "
                    "LoRA (peft_config=default_lora_config())."
                )
            if trained:
                self.dtypes[tensor.dtype] += tensor.numel()
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()
        denoiser.requires_grad_(True)
        return sum(any(True for _ in module.parameters(recurse=False)) for module in denoiser.modules())

    @property
    def description(self) -> str:
        return f"all weights of {' and '.join(self.modules)}"

    def base_dtype(self, denoisers: dict[str, nn.Module]) -> torch.dtype:
        """Return the dtype in which most of the weights were loaded."""
        return self.dtypes.most_common(1)[0][0]

    def gathered(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Return the pipeline to pass to `save`: sharded denoisers are gathered into host memory.

        If a denoiser is sharded, all ranks must call this, and only the first process of each machine gets it whole.
        """
        whole = copy.copy(pipeline)
        for name, cls in self.classes.items():
            if is_sharded(getattr(pipeline, name)):
                component = gathered_component(getattr(pipeline, name), cls)
                if component is not None:
                    setattr(whole, name, component)
        return whole

    def save(self, pipeline: DiffusionPipeline, folder: str | os.PathLike) -> list[Path]:
        return save_components(pipeline, list(self.modules), Path(folder))

    def load(self, pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
        load_components(pipeline, list(self.modules), Path(folder))

    def check_saved(
        self, pipeline: DiffusionPipeline, folder: str | os.PathLike, call: dict, tolerance: float
    ) -> float:
        return check_components(pipeline, list(self.modules), Path(folder), call, tolerance)

    def check_read_back(self, pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
        check_read_back(pipeline, list(self.modules), Path(folder))


@contextlib.contextmanager
def exchanged(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Swap parameters and values while the context is open, without a third copy.

    No pending backward may need the parameters.

    Args:
        parameters: {name: parameter}.
        values: {name: value} of the part of each parameter that this process holds, see `held`.
    """
    _exchange(parameters, values)
    try:
        yield
    finally:
        _exchange(parameters, values)


@torch.no_grad()
def _exchange(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        mine = held(parameter)
        own = mine.clone()
        mine.copy_(values[name])
        values[name].copy_(own)
