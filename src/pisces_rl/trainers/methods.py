"""Methods that sample groups of videos and train on them: {name: (trainer, config)}."""

from .forward.awm import AWMConfig, AWMTrainer
from .forward.flow_dpo import FlowDPOConfig, FlowDPOTrainer
from .forward.nft import NFTConfig, NFTTrainer
from .forward.rvm import RVMConfig, RVMTrainer
from .grpo.flash_grpo import FlashGRPOConfig, FlashGRPOTrainer
from .grpo.flow_dppo import FlowDPPOConfig, FlowDPPOTrainer
from .grpo.grpo_config import VideoGRPOConfig
from .grpo.grpo_trainer import VideoGRPOTrainer
from .rollouts.rollout_config import RolloutConfig
from .rollouts.rollout_trainer import RolloutTrainer

METHODS: dict[str, tuple[type[RolloutTrainer], type[RolloutConfig]]] = {
    "grpo": (VideoGRPOTrainer, VideoGRPOConfig),
    "flash_grpo": (FlashGRPOTrainer, FlashGRPOConfig),
    "flow_dppo": (FlowDPPOTrainer, FlowDPPOConfig),
    "nft": (NFTTrainer, NFTConfig),
    "awm": (AWMTrainer, AWMConfig),
    "rvm": (RVMTrainer, RVMConfig),
    "flow_dpo": (FlowDPOTrainer, FlowDPOConfig),
}
