"""Any diffusers text-to-video pipeline as a stochastic policy.

What: `VideoPolicy(pipeline).sample(...)` returns videos, states and log-probs; `.replay(...)` computes the log-probs
again, with gradients. Why: there is no code per model, so no part of a model can be re-implemented wrongly. How: both
run the pipeline's own `__call__`; only its scheduler's step is replaced. Gotcha: outside these two calls the pipeline
is exactly what the user passed in.
"""

from .full.full_weights import FULL, FullWeights, exchanged
from .lora.adapters import (
    adapter_values,
    adapters_off,
    add_lora,
    check_fits,
    check_no_adapters,
    default_lora_config,
    lora_parameters,
    set_adapter,
)
from .lora.lora_files import has_lora_loader, load_lora, load_lora_state, save_lora
from .lora.options import check_lora_config
from .lora.saved_adapter import SavedAdapter, read_adapter
from .lora.saved_check import check_saved_lora, check_saved_weights, without_adapters
from .lora.trained_lora import TrainedLoRA
from .pipeline.guider import has_guider
from .rollout import Rollout
from .schedule.scheduler import PolicyError
from .sessions.backprop import DecodedPart
from .sessions.one_step import Prediction
from .sessions.session import ReplayStep
from .sharded.parts import distribute, gathered, gathered_values, held, held_values, norm, parts_of_values
from .sharded.sharding import is_sharded
from .video_policy import VideoPolicy

__all__ = [
    "FULL",
    "DecodedPart",
    "FullWeights",
    "PolicyError",
    "Prediction",
    "ReplayStep",
    "Rollout",
    "SavedAdapter",
    "TrainedLoRA",
    "VideoPolicy",
    "adapter_values",
    "adapters_off",
    "add_lora",
    "check_fits",
    "check_lora_config",
    "check_no_adapters",
    "check_saved_lora",
    "check_saved_weights",
    "default_lora_config",
    "distribute",
    "exchanged",
    "gathered",
    "gathered_values",
    "has_guider",
    "has_lora_loader",
    "held",
    "held_values",
    "is_sharded",
    "load_lora",
    "load_lora_state",
    "lora_parameters",
    "norm",
    "parts_of_values",
    "read_adapter",
    "save_lora",
    "set_adapter",
    "without_adapters",
]
