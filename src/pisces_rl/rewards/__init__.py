"""Rewards: any callable f(prompts, videos, **columns) -> numbers. See `contract` for the rules."""

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # for type checkers, which do not see `__getattr__`
    from .features import cache_features as cache_features
    from .features import load_features as load_features
    from .loading import ENCODER_REWARDS as ENCODER_REWARDS
    from .loading import REWARDS as REWARDS
    from .loading import load_reward as load_reward
    from .ot_attention import OTAttention as OTAttention
    from .quality import OTQualityReward as OTQualityReward
    from .remote_vlm_judge import RemoteVLMJudge as RemoteVLMJudge
    from .semantic import OTSemanticReward as OTSemanticReward
    from .server.remote import RemoteReward as RemoteReward
    from .vlm_judge import VLMJudge as VLMJudge


def __getattr__(name: str) -> object:
    """Import on first use what needs transformers."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
