"""Full fine-tuning under FSDP2: an optimizer of sharded weights, and gradient clipping over all ranks."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ....policy import distribute, gathered, held, norm

#: Values of `optim` that update each element independently, so that they work on a shard of a weight.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def use_sharded_optimizer(accelerator: Accelerator) -> None:
    """Make accelerate create a `ShardedOptimizer` and clip gradients by the norm over all ranks."""

    def prepare(optimizer, device_placement=None):
        if not isinstance(optimizer, ShardedOptimizer):  # it already is one in a second call of train()
            optimizer = ShardedOptimizer(optimizer, device_placement=False)
        accelerator._optimizers = [optimizer]
        return optimizer

    accelerator.prepare_optimizer, accelerator.clip_grad_norm_ = prepare, clip_gradients


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
    """Clip as torch does, g <- g min(1, max_norm / (|g| + 1e-6)) with g the gradient of all parameters; return |g|.

    All ranks must call this.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # on all ranks
        return torch.zeros(())
    total = norm(gradients)
    if max_norm < float("inf"):
        torch._foreach_mul_([held(g) for g in gradients], torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


class ShardedOptimizer(AcceleratedOptimizer):
    """An optimizer of DTensors with sharded states, whose state dict is that of an unsharded optimizer.

    All ranks must call `state_dict`; only the first process of each machine gets the tensors, in host memory.
    """

    def state_dict(self) -> dict:
        state = super().state_dict()
        whole = {
            index: {
                key: gathered(held(value), value) if isinstance(value, DTensor) else value
                for key, value in own.items()
            }
            for index, own in state["state"].items()
        }
        return state | {"state": whole}

    def load_state_dict(self, state_dict: dict) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parts = {
            index: {
                key: distribute(value, parameters[index]) if _of_shape(value, parameters[index]) else value
                for key, value in own.items()
            }
            for index, own in state_dict["state"].items()
        }
        super().load_state_dict(state_dict | {"state": parts})


def _of_shape(value, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape
