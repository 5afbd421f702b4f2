"""Trainers: `Trainer(model, reward_funcs, args, train_dataset)`, in TRL's shape."""

from .auxiliary import AuxiliaryLoss
from .backprop_config import RewardBackpropConfig
from .backprop_trainer import RewardBackpropTrainer
from .base import VideoPolicyTrainer
from .consistency import ConsistencyDistillation
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer
from .loading import load_pipeline

__all__ = [
    "AuxiliaryLoss", "ConsistencyDistillation", "RewardBackpropConfig", "RewardBackpropTrainer", "VideoGRPOConfig",
    "VideoGRPOTrainer", "VideoPolicyTrainer", "load_pipeline",
]
