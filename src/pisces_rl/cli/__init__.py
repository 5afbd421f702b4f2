"""The commands of `pisces-rl` and their shared code: arguments from YAML and the command line, prompts and rewards."""

import argparse
import importlib
from pathlib import Path
from typing import NoReturn

_HOME = dict.fromkeys(("load_prompt_dataset", "load_reward_function", "parse_arguments"), "arguments")
__all__ = ["RECIPES", "usage_error", *_HOME]
RECIPES = Path(__file__).parents[3] / "recipes"  # only in a source tree; an installed package has none


def __getattr__(name: str):
    """Load functions that need torch on first use: the program imports this package to print its help."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def usage_error(message: str, prog: str | None = None) -> NoReturn:
    """End the program as argparse does on an invalid command line: print the message and exit with status 2.

    Args:
        message: the argument, its value, what is allowed and how to fix it.
        prog: the program's name; None takes it from `sys.argv`.
    """
    parser = argparse.ArgumentParser(prog=prog)
    parser.exit(2, f"{parser.prog}: error: {message}\n")
