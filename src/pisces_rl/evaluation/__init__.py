"""Evaluation of rewards and policies."""

import importlib

_HOME = dict.fromkeys(("CleanClips", "RewardReport", "evaluate_reward", "plan_inside_objects"), "reward_checks")
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Load functions that need torch on first use: `pisces-rl` imports this package for its commands."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
