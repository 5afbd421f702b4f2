"""The commands of `pisces-rl` and what they share: arguments from YAML and the command line, prompts and rewards."""

import importlib

_HOME = dict.fromkeys(("load_prompt_dataset", "load_reward_function", "parse_arguments"), "arguments")
__all__ = list(_HOME)


def __getattr__(name: str):
    """The program imports this package to print its help: what needs torch is loaded on first use."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
