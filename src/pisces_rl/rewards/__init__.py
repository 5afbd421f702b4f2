"""Rewards: any callable f(prompts, videos, **columns) -> numbers. See `contract` for the rules."""

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "ENCODER_REWARDS": "known_names",
    "OFFERED": "signature",
    "OTAttention": "ot_attention",
    "OTQualityReward": "quality",
    "OTSemanticReward": "semantic",
    "REWARDS": "known_names",
    "RemoteReward": "server.remote",
    "RemoteVLMJudge": "remote_vlm_judge",
    "RewardError": "contract",
    "RewardPanel": "panel",
    "RewardTable": "table",
    "VLMJudge": "vlm_judge",
    "cache_features": "features",
    "compares_videos": "contract",
    "exposure": "motion",
    "load_features": "features",
    "load_reward": "loading",
    "motion_amount": "motion",
    "reward_name": "contract",
    "temporal_smoothness": "motion",
}
__all__ = list(_HOME)

if TYPE_CHECKING:  # for type checkers, which do not see `__getattr__`
    from .contract import RewardError as RewardError
    from .contract import compares_videos as compares_videos
    from .contract import reward_name as reward_name
    from .features import cache_features as cache_features
    from .features import load_features as load_features
    from .known_names import ENCODER_REWARDS as ENCODER_REWARDS
    from .known_names import REWARDS as REWARDS
    from .loading import load_reward as load_reward
    from .motion import exposure as exposure
    from .motion import motion_amount as motion_amount
    from .motion import temporal_smoothness as temporal_smoothness
    from .ot_attention import OTAttention as OTAttention
    from .panel import RewardPanel as RewardPanel
    from .quality import OTQualityReward as OTQualityReward
    from .remote_vlm_judge import RemoteVLMJudge as RemoteVLMJudge
    from .semantic import OTSemanticReward as OTSemanticReward
    from .server.remote import RemoteReward as RemoteReward
    from .signature import OFFERED as OFFERED
    from .table import RewardTable as RewardTable
    from .vlm_judge import VLMJudge as VLMJudge


def __getattr__(name: str) -> object:
    """Load names on first use: `pisces-rl serve --help` imports this package."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
