"""Evaluation of rewards and policies."""

import importlib
from typing import TYPE_CHECKING

_HOME = dict.fromkeys(("CleanClips", "RewardReport", "evaluate_reward", "plan_inside_objects"), "reward_checks")
__all__ = list(_HOME)

if TYPE_CHECKING:  # for type checkers, which do not see `__getattr__`
    from .reward_checks import CleanClips as CleanClips
    from .reward_checks import RewardReport as RewardReport
    from .reward_checks import evaluate_reward as evaluate_reward
    from .reward_checks import plan_inside_objects as plan_inside_objects


def __getattr__(name: str) -> object:
    """Load functions that need torch on first use: `pisces-rl` imports this package for its commands."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
