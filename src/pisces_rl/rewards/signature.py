"""Which of the offered arguments a reward takes."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

#: Arguments offered to every reward besides the columns of the dataset; no column may have one of these names.
OFFERED = ("prompts", "videos", "trainer_state", "log_extra", "log_metric")
Parameters = Mapping[str, inspect.Parameter]


def arguments(func: Callable, offered: dict) -> tuple[list, dict]:
    """Return the offered arguments that a callable takes: by position if positional-only; with **kwargs, all."""
    parameters = parameters_of(func)
    by_position = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    while by_position and not set(by_position) <= set(offered):
        by_position.pop()  # either it has a default, or Python will name the missing argument
    named = offered if _takes_any(parameters) else parameters
    return [offered[name] for name in by_position], {
        name: offered[name] for name in named if name in offered and name not in by_position
    }


def parameters_of(func: Callable) -> Parameters:
    """Return the parameters of a reward: of a module, those of its `forward`; of a partial, those left unbound; of a
    wrapper without `functools.wraps`, those of the wrapped callable.

    Raises:
        ValueError: the callable has no signature, such as a built-in function.
    """
    if isinstance(func, functools.partial):
        left = parameters_of(func.func)
        by_position = [name for name, p in left.items() if p.kind < inspect.Parameter.VAR_POSITIONAL]
        bound = {*by_position[: len(func.args)], *func.keywords}
        return {name: p for name, p in left.items() if name not in bound}
    held = _wrapped(func)
    return _parameters(func) if held is None else parameters_of(held)


def layers(func: Any) -> Iterator[Any]:
    """Yield a callable and what it wraps, from the outside in: partials, decorated functions, wrappers."""
    while func is not None:
        yield func
        if isinstance(func, functools.partial):
            func = func.func
        elif inspect.isfunction(func) and "__wrapped__" in func.__dict__:
            func = func.__wrapped__
        else:
            func = _wrapped(func)


def _parameters(func: Callable) -> Parameters:
    return inspect.signature(func.forward if isinstance(func, nn.Module) else func).parameters


def _takes_any(parameters: Parameters) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _names_inputs(parameters: Parameters) -> bool:
    return "prompts" in parameters or "videos" in parameters


def _wrapped(func: Callable) -> Callable | None:
    """Return what a callable with *args and **kwargs wraps, or None.

    It is the only callable taking `prompts` or `videos` that it holds in its closure, attributes or child modules.
    Nothing is called to find it, since a failing call could have side effects. A reward with **kwargs but no *args
    is not a wrapper: it reads its inputs from them, and may hold a scorer too.
    """
    if isinstance(func, functools.partial):
        return None
    try:
        parameters = _parameters(func)
    except ValueError:
        return None
    kinds = {p.kind for p in parameters.values()}
    if not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds or _names_inputs(parameters):
        return None
    found = [held for held in held_by(func) if _takes_inputs(held)]
    return found[0] if len(found) == 1 else None


def _takes_inputs(held: object) -> bool:
    if not callable(held) or inspect.isclass(held):
        return False
    try:
        return _names_inputs(parameters_of(held))
    except (ValueError, RecursionError):  # it has no signature, or holds itself
        return False


def held_by(func: Callable) -> list:
    """Return what a wrapper holds: the closure of its code, and a module's children or an object's attributes."""
    if isinstance(func, nn.Module):
        code, attributes = getattr(func.forward, "__func__", None), func.children()
    elif inspect.isfunction(func):
        code, attributes = func, ()
    elif inspect.ismethod(func):
        code, attributes = func.__func__, getattr(func.__self__, "__dict__", {}).values()
    else:
        code, attributes = type(func).__call__, getattr(func, "__dict__", {}).values()
    cells = code.__closure__ or () if inspect.isfunction(code) else ()
    return [*(cell.cell_contents for cell in cells if cell != types.CellType()), *attributes]
