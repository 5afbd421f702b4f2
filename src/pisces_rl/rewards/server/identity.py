"""Identify a served reward: hash its code, settings and weights, and list the columns it takes."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pisces_rl.rewards.contract import reward_name
from pisces_rl.rewards.signature import OFFERED, held_by, layers, parameters_of

#: Secrets, and settings that change only how fast or where a reward is computed.
LEFT_OUT = ("api_key", "batch_size", "device", "headers", "micro_batch", "offload", "token", "training")
#: Strings that may hold the name of an encoder's folder.
NAMES = ("encoder", "name")


def identity(func: Callable) -> str:
    """Return 16 hexadecimal digits: a hash of a reward's name, the source of its function or class, its settings, and
    the weights of the modules that it holds in its closure, its attributes, and the globals that its function names.

    Settings are strings, numbers (floats to six digits), tensors, arrays, and lists and dicts of them. They come from
    a partial's arguments, a function's closure and the globals it names, and attributes, except for `LEFT_OUT`,
    `NAMES` and names that begin with an underscore. They are collected from the reward and from objects it holds whose
    class belongs to this package or to the reward's. A class can restrict them with a tuple `identifying` of names.
    Models loaded on the first call are not included.
    """
    digest = hashlib.sha256(reward_name(func).encode())
    seen: set[int] = set()
    for layer in layers(func):
        code = layer if inspect.isroutine(layer) else type(layer)
        try:
            digest.update(inspect.getsource(code).encode())
        except (OSError, TypeError):  # no source: a partial, or a class defined in a notebook
            digest.update(f"{code.__module__}.{code.__qualname__}".encode())
        own = {"pisces_rl", _package(code)} - {"builtins", "functools", "torch"}
        for line in _lines("", _settings(layer), own, seen):
            digest.update(line)
        for module in _modules(layer):
            if id(module) not in seen:
                seen.add(id(module))
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    digest.update(_bits(name, tensor))
    return digest.hexdigest()[:16]


def columns_of(func: Callable) -> list[str] | None:
    """Return the columns that a reward names; None if it takes all."""
    parameters = parameters_of(func).values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [p.name for p in parameters if p.name not in OFFERED and p.kind is not inspect.Parameter.VAR_POSITIONAL]


def _settings(holder: object) -> dict[str, object]:
    """Return what a layer of a reward, or a part of it, holds, by name."""
    if isinstance(holder, functools.partial):
        return dict(enumerate(holder.args)) | holder.keywords
    if inspect.isfunction(holder):
        known = inspect.getclosurevars(holder)
        return {**known.nonlocals, **known.globals}
    values = getattr(holder.__self__ if inspect.ismethod(holder) else holder, "__dict__", {})
    names = getattr(type(holder), "identifying", values)
    return {name: values[name] for name in names if name in values}


def _lines(path: str, value: object, packages: set[str], seen: set[int]) -> Iterator[bytes]:
    """Yield a value and what it holds, each setting with its path."""
    if isinstance(value, Tensor) or isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield _bits(path, torch.as_tensor(value))
    elif value is None or isinstance(value, (str, bytes, bool, int, torch.dtype)):
        yield f"{path} {value!r}\n".encode()
    elif isinstance(value, float):
        yield f"{path} {value:.6g}\n".encode()
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from _lines(f"{path}.{place}", part, packages, seen)
    elif isinstance(value, dict):
        for name, part in sorted(value.items(), key=lambda pair: str(pair[0])):
            named = name in NAMES and isinstance(part, str)
            if not (str(name).startswith("_") or name in LEFT_OUT or named):
                yield from _lines(f"{path}.{name}", part, packages, seen)
    elif _package(type(value)) in packages and not inspect.isroutine(value) and not inspect.isclass(value):
        if id(value) not in seen:
            seen.add(id(value))
            yield f"{path} {type(value).__qualname__}\n".encode()
            yield from _lines(path, _settings(value), packages, seen)


def _bits(name: str, tensor: Tensor) -> bytes:
    bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + bits


def _package(kind: object) -> str:
    return (getattr(kind, "__module__", None) or "").partition(".")[0]


def _modules(layer: Callable) -> Iterator[nn.Module]:
    if isinstance(layer, nn.Module):
        yield layer
        return
    found = held_by(layer)
    if inspect.isfunction(layer):
        found += inspect.getclosurevars(layer).globals.values()
    yield from (value for value in found if isinstance(value, nn.Module))
