"""Trainers with TRL's interface: `Trainer(model, reward_funcs, args, train_dataset)`."""

from .auxiliary.auxiliary_loss import AuxiliaryLoss
from .auxiliary.consistency import ConsistencyDistillation
from .backprop.backprop_config import RewardBackpropConfig
from .backprop.backprop_trainer import RewardBackpropTrainer
from .base.policy_trainer import VideoPolicyTrainer
from .base.setup.load_pipeline import load_pipeline
from .forward.awm import AWMConfig, AWMTrainer
from .forward.flow_dpo import FlowDPOConfig, FlowDPOTrainer
from .forward.nft import NFTConfig, NFTTrainer
from .forward.rvm import RVMConfig, RVMTrainer
from .grpo.flash_grpo import FlashGRPOConfig, FlashGRPOTrainer
from .grpo.flow_dppo import FlowDPPOConfig, FlowDPPOTrainer
from .grpo.grpo_config import VideoGRPOConfig
from .grpo.grpo_trainer import VideoGRPOTrainer
from .methods import METHODS
from .rollouts.rollout_config import RolloutConfig
from .rollouts.rollout_trainer import RolloutTrainer

__all__ = [
    "METHODS",
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
    "VideoPolicyTrainer",
    "load_pipeline",
]
