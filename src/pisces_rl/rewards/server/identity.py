"""Which reward a server has: its code and weights as a hash, and the columns that it takes."""

import hashlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pisces_rl.rewards.contract import reward_name
from pisces_rl.rewards.signature import OFFERED, held_by, layers, parameters_of


def identity(func: Callable) -> str:
    """16 hexadecimal digits of a reward's name, the source of its function or class, and the weights of the modules
    that it holds: in its closure, its attributes, and the globals that its function names. Other settings, and models
    that are loaded at the first call, have no part in it."""
    digest = hashlib.sha256(reward_name(func).encode())
    seen: set[int] = set()
    for layer in layers(func):
        code = layer if inspect.isroutine(layer) else type(layer)
        try:
            digest.update(inspect.getsource(code).encode())
        except (OSError, TypeError):  # a partial, a class of a notebook
            digest.update(f"{code.__module__}.{code.__qualname__}".encode())
        for module in _modules(layer):
            if id(module) not in seen:
                seen.add(id(module))
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def columns_of(func: Callable) -> list[str] | None:
    """The columns that a reward names; None where it takes all."""
    parameters = parameters_of(func).values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [p.name for p in parameters if p.name not in OFFERED and p.kind is not inspect.Parameter.VAR_POSITIONAL]


def _modules(layer: Callable) -> Iterator[nn.Module]:
    if isinstance(layer, nn.Module):
        yield layer
        return
    found = held_by(layer)
    if inspect.isfunction(layer):
        found += inspect.getclosurevars(layer).globals.values()
    yield from (value for value in found if isinstance(value, nn.Module))
