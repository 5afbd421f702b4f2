"""Make a denoiser compute its products and norms in fewer passes over memory, with linear.py and wan_block.py."""

import contextlib
from collections.abc import Iterator

from diffusers.models.activations import GELU
from peft.tuners.lora import Linear
from torch import nn

from .linear import OneProductGELU, OneProductLinear
from .wan_block import BLOCKS, PROCESSORS

#: {class of a module or processor: class that computes the same in fewer passes}.
FUSED = {Linear: OneProductLinear, GELU: OneProductGELU, **BLOCKS, **PROCESSORS}
PLAIN = {fused: plain for plain, fused in FUSED.items()}


def _fuses(module: nn.Module) -> bool:
    if type(module) is Linear:
        return isinstance(module.get_base_layer(), nn.Linear)
    if type(module) is GELU:
        return module.approximate == "tanh" and module.proj.bias is not None
    return type(module) in FUSED


def _parts(denoiser: nn.Module) -> Iterator[object]:
    for module in denoiser.modules():
        yield module
        yield getattr(module, "processor", None)


def fuse_products(denoiser: nn.Module) -> int:
    """Make a denoiser compute its LoRA layers, projections with GELU and, in Wan, its blocks in fewer passes.

    Parameters, names and saved files stay the same. Returns the number of modules changed.
    """
    count = 0
    for part in _parts(denoiser):
        if _fuses(part):
            part.__class__ = FUSED[type(part)]
            count += 1
    return count


def unfuse_products(denoiser: nn.Module) -> None:
    """Undo `fuse_products`, in a module or a copy of one."""
    for part in _parts(denoiser):
        if type(part) in PLAIN:
            part.__class__ = PLAIN[type(part)]


@contextlib.contextmanager
def plain_products(denoiser: nn.Module) -> Iterator[None]:
    """Undo `fuse_products` while the context is open."""
    fused = any(type(part) in PLAIN for part in _parts(denoiser))
    unfuse_products(denoiser)
    try:
        yield
    finally:
        if fused:
            fuse_products(denoiser)
