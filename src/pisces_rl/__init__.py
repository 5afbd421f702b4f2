"""pisces_rl: reinforcement-learning post-training of text-to-video diffusion models, in TRL's idiom.

Any diffusers text-to-video pipeline is a policy, any callable is a reward, and the result is a LoRA adapter.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "PolicyError": "policy",
    "Rollout": "policy",
    "VideoPolicy": "policy",
    "export_adapter": "export",
    "merge_adapter": "export",
    "RewardError": "rewards",
    "RewardPanel": "rewards",
    **dict.fromkeys(
        (
            "AWMConfig",
            "AWMTrainer",
            "AuxiliaryLoss",
            "ConsistencyDistillation",
            "FlashGRPOConfig",
            "FlashGRPOTrainer",
            "FlowDPOConfig",
            "FlowDPOTrainer",
            "FlowDPPOConfig",
            "FlowDPPOTrainer",
            "METHODS",
            "NFTConfig",
            "NFTTrainer",
            "RVMConfig",
            "RVMTrainer",
            "RewardBackpropConfig",
            "RewardBackpropTrainer",
            "RolloutConfig",
            "RolloutTrainer",
            "VideoGRPOConfig",
            "VideoGRPOTrainer",
            "load_pipeline",
        ),
        "trainers",
    ),
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # for type checkers, which do not see `__getattr__`
    from .export import export_adapter as export_adapter
    from .export import merge_adapter as merge_adapter
    from .policy import PolicyError as PolicyError
    from .policy import Rollout as Rollout
    from .policy import VideoPolicy as VideoPolicy
    from .rewards import RewardError as RewardError
    from .rewards import RewardPanel as RewardPanel
    from .trainers import METHODS as METHODS
    from .trainers import AuxiliaryLoss as AuxiliaryLoss
    from .trainers import AWMConfig as AWMConfig
    from .trainers import AWMTrainer as AWMTrainer
    from .trainers import ConsistencyDistillation as ConsistencyDistillation
    from .trainers import FlashGRPOConfig as FlashGRPOConfig
    from .trainers import FlashGRPOTrainer as FlashGRPOTrainer
    from .trainers import FlowDPOConfig as FlowDPOConfig
    from .trainers import FlowDPOTrainer as FlowDPOTrainer
    from .trainers import FlowDPPOConfig as FlowDPPOConfig
    from .trainers import FlowDPPOTrainer as FlowDPPOTrainer
    from .trainers import NFTConfig as NFTConfig
    from .trainers import NFTTrainer as NFTTrainer
    from .trainers import RewardBackpropConfig as RewardBackpropConfig
    from .trainers import RewardBackpropTrainer as RewardBackpropTrainer
    from .trainers import RolloutConfig as RolloutConfig
    from .trainers import RolloutTrainer as RolloutTrainer
    from .trainers import RVMConfig as RVMConfig
    from .trainers import RVMTrainer as RVMTrainer
    from .trainers import VideoGRPOConfig as VideoGRPOConfig
    from .trainers import VideoGRPOTrainer as VideoGRPOTrainer
    from .trainers import load_pipeline as load_pipeline


def __getattr__(name: str) -> object:
    """Load submodules on first use, so that importing the package is cheap."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
