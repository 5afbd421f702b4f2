"""Trainers: `Trainer(model, reward_funcs, args, train_dataset)`, in TRL's shape."""

from .base import VideoPolicyTrainer, load_pipeline
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer

__all__ = ["VideoGRPOConfig", "VideoGRPOTrainer", "VideoPolicyTrainer", "load_pipeline"]
