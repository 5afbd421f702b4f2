"""The methods that sample groups of videos and train on them, by name."""

from .awm import AWMConfig, AWMTrainer
from .flash_grpo import FlashGRPOConfig, FlashGRPOTrainer
from .flow_dpo import FlowDPOConfig, FlowDPOTrainer
from .flow_dppo import FlowDPPOConfig, FlowDPPOTrainer
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer
from .nft import NFTConfig, NFTTrainer
from .rollout_config import RolloutConfig
from .rollout_trainer import RolloutTrainer
from .rvm import RVMConfig, RVMTrainer

METHODS: dict[str, tuple[type[RolloutTrainer], type[RolloutConfig]]] = {
    "grpo": (VideoGRPOTrainer, VideoGRPOConfig),
    "flash_grpo": (FlashGRPOTrainer, FlashGRPOConfig),
    "flow_dppo": (FlowDPPOTrainer, FlowDPPOConfig),
    "nft": (NFTTrainer, NFTConfig),
    "awm": (AWMTrainer, AWMConfig),
    "rvm": (RVMTrainer, RVMConfig),
    "flow_dpo": (FlowDPOTrainer, FlowDPOConfig),
}
