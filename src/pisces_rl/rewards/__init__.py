"""Rewards: any callable f(prompts, videos, **columns) -> numbers. See `contract` for the rules."""

import importlib

from .contract import RewardError, compares_videos, reward_name
from .motion import exposure, motion_amount, temporal_smoothness
from .panel import RewardPanel
from .signature import OFFERED
from .table import RewardTable

_HOME = {
    "ENCODER_REWARDS": "loading",
    "OTAttention": "ot_attention",
    "OTQualityReward": "quality",
    "OTSemanticReward": "semantic",
    "REWARDS": "loading",
    "RemoteReward": "server.remote",
    "RemoteVLMJudge": "remote_vlm_judge",
    "VLMJudge": "vlm_judge",
    "cache_features": "features",
    "load_features": "features",
    "load_reward": "loading",
}
__all__ = [
    "OFFERED",
    "RewardError",
    "RewardPanel",
    "RewardTable",
    "compares_videos",
    "exposure",
    "motion_amount",
    "reward_name",
    "temporal_smoothness",
    *_HOME,
]


def __getattr__(name: str) -> object:
    """Import on first use what needs transformers."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
