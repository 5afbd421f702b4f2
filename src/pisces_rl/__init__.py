"""pisces_rl: reinforcement-learning post-training of text-to-video diffusion models, in TRL's idiom.

Any diffusers text-to-video pipeline is a policy, any callable is a reward, and the result is a LoRA adapter.
"""

import importlib

__version__ = "0.1.0.dev0"

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


def __getattr__(name: str) -> object:
    """Load submodules on first use, so that importing the package is cheap."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
