"""Asking rewards and policies what they are worth."""

from .reward_checks import CleanClips, RewardReport, evaluate_reward, plan_inside_objects

__all__ = ["CleanClips", "RewardReport", "evaluate_reward", "plan_inside_objects"]
