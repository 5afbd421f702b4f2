"""Trainers: `Trainer(model, reward_funcs, args, train_dataset)`, in TRL's shape."""

from .auxiliary import AuxiliaryLoss
from .awm import AWMConfig, AWMTrainer
from .backprop_config import RewardBackpropConfig
from .backprop_trainer import RewardBackpropTrainer
from .base import VideoPolicyTrainer
from .consistency import ConsistencyDistillation
from .flash_grpo import FlashGRPOConfig, FlashGRPOTrainer
from .flow_dpo import FlowDPOConfig, FlowDPOTrainer
from .flow_dppo import FlowDPPOConfig, FlowDPPOTrainer
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer
from .loading import load_pipeline
from .methods import METHODS
from .nft import NFTConfig, NFTTrainer
from .rollout_config import RolloutConfig
from .rollout_trainer import RolloutTrainer
from .rvm import RVMConfig, RVMTrainer

__all__ = [
    "METHODS", "AWMConfig", "AWMTrainer", "AuxiliaryLoss", "ConsistencyDistillation", "FlashGRPOConfig",
    "FlashGRPOTrainer", "FlowDPOConfig", "FlowDPOTrainer", "FlowDPPOConfig", "FlowDPPOTrainer", "NFTConfig",
    "NFTTrainer", "RVMConfig", "RVMTrainer", "RewardBackpropConfig", "RewardBackpropTrainer", "RolloutConfig",
    "RolloutTrainer", "VideoGRPOConfig", "VideoGRPOTrainer", "VideoPolicyTrainer", "load_pipeline",
]
