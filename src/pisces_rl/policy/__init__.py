"""Any diffusers text-to-video pipeline as a stochastic policy.

What: `VideoPolicy(pipeline).sample(...)` gives videos, states and log-probs; `.replay(...)` gives the log-probs again
with gradients. Why: no code per model, so nothing of the model can be re-implemented wrongly. How: the pipeline's own
`__call__` runs both times; only its scheduler's step is ours. Gotcha: outside these two calls the pipeline is exactly
what the user passed in.
"""

from .backprop import DecodedPart
from .guider import has_guider
from .lora import (
    adapter_values,
    adapters_off,
    add_lora,
    check_no_adapters,
    default_lora_config,
    lora_parameters,
    set_adapter,
)
from .lora_check import check_saved_lora, check_saved_weights, without_adapters
from .lora_files import load_lora, load_lora_state, save_lora
from .lora_options import check_lora_config
from .one_step import Prediction
from .rollout import Rollout
from .saved_adapter import SavedAdapter, read_adapter
from .scheduler import PolicyError
from .session import ReplayStep
from .sharding import is_sharded
from .video_policy import VideoPolicy

__all__ = [
    "DecodedPart", "PolicyError", "Prediction", "ReplayStep", "Rollout", "SavedAdapter", "VideoPolicy",
    "adapter_values", "adapters_off", "add_lora", "check_lora_config", "check_no_adapters", "check_saved_lora",
    "check_saved_weights", "default_lora_config", "has_guider", "is_sharded", "load_lora", "load_lora_state",
    "lora_parameters", "read_adapter", "save_lora", "set_adapter", "without_adapters",
]
