"""The commands of `pisces-rl` and what they share: arguments from YAML and the command line, prompts and rewards."""

import importlib
from pathlib import Path

_HOME = dict.fromkeys(("load_prompt_dataset", "load_reward_function", "parse_arguments"), "arguments")
__all__ = ["RECIPES", *_HOME]
RECIPES = Path(__file__).parents[3] / "recipes"  # of a source tree; an installed package has none


def __getattr__(name: str):
    """The program imports this package to print its help: what needs torch is loaded on first use."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
