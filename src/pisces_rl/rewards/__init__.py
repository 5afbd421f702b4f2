"""Rewards: any callable f(prompts, videos, **columns) -> numbers. See `contract` for the rules."""

from .contract import RewardError, reward_name
from .motion import exposure, motion_amount, temporal_smoothness
from .panel import RewardPanel, RewardTable

__all__ = ["RewardError", "RewardPanel", "RewardTable", "exposure", "motion_amount", "reward_name",
           "temporal_smoothness"]
