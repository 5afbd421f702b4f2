"""FSDP2 of weights that are trained whole: an optimizer of their parts, and the norm of their gradient."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ....policy import distribute, gathered, held, norm

#: Values of `optim` that treat each number by itself, so that a part of a weight is as good as a weight.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def use_sharded_optimizer(accelerator: Accelerator) -> None:
    """Let accelerate make `ShardedOptimizer`s, and clip by the norm over all ranks."""

    def prepare(optimizer, device_placement=None):
        if not isinstance(optimizer, ShardedOptimizer):  # as a second `train` has it
            optimizer = ShardedOptimizer(optimizer, device_placement=False)
        accelerator._optimizers = [optimizer]
        return optimizer

    accelerator.prepare_optimizer, accelerator.clip_grad_norm_ = prepare, clip_gradients


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
    """g <- g min(1, max_norm / (|g| + 1e-6)) for the gradient g of all parameters, as torch clips it; returns |g|.

    All ranks must call.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # on all ranks
        return torch.zeros(())
    total = norm(gradients)
    if max_norm < float("inf"):
        torch._foreach_mul_([held(g) for g in gradients], torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


class ShardedOptimizer(AcceleratedOptimizer):
    """An optimizer of DTensors, with states in parts like theirs; what it saves and loads is whole, as of one process.

    All ranks must call `state_dict`; only the first process of each machine gets the tensors, in the host's memory.
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
