"""The adapter's gradients: averaged over processes in few messages; their norms, denoiser by denoiser."""

import warnings

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ....policy import norm
from .zero import MESSAGE, PartitionedOptimizer


def average_gradients(
    adapter: dict[str, nn.Parameter], accelerator: Accelerator, context_parallel: int, optimizer: Optimizer
) -> None:
    """The mean over videos, of the sum over the `context_parallel` processes that share a video's tokens.

    A gradient that is None, as where every sample had advantage 0, becomes 0: the optimizer then takes the same step
    (of its momentum) on one process as on several. An optimizer in parts reduces them itself. Those of weights in
    parts were averaged by each backward.
    """
    for parameter in adapter.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if isinstance(optimizer, PartitionedOptimizer):
        torch._foreach_mul_([p.grad for p in adapter.values()], context_parallel)
        optimizer.reduce()
        return
    if accelerator.num_processes == 1 or any(isinstance(p, DTensor) for p in adapter.values()):
        return
    for message in _messages([p.grad for p in adapter.values()]):
        flat = accelerator.reduce(torch.cat([g.flatten() for g in message]), reduction="mean") * context_parallel
        for gradient, mean in zip(message, flat.split([g.numel() for g in message])):
            gradient.copy_(mean.view_as(gradient))


def _messages(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Gradients in parts of at most `MESSAGE` numbers: an adapter's are one, all weights' copy would need memory."""
    messages, size = [[]], 0
    for gradient in gradients:
        size += gradient.numel()
        if messages[-1] and size > MESSAGE:
            messages.append([])
            size = gradient.numel()
        messages[-1].append(gradient)
    return messages


class ExpertGradients:
    """Gradient norms of a pipeline's denoisers; says once of each that no trained denoising step called it.

    Args:
        adapter: {"DENOISER.parameter": trained parameter}. names: of the denoisers that have an adapter.
    """

    def __init__(self, adapter: dict[str, nn.Parameter], names: list[str]):
        self.parameters = {n: [p for key, p in adapter.items() if key.startswith(f"{n}.")] for n in names}
        self.idle: set[str] = set()  # of which it was said

    def norms(self, step: int, optimizer: Optimizer) -> dict[str, float]:
        """{denoiser: norm of its adapter's gradient} at an optimizer step."""
        if isinstance(optimizer, PartitionedOptimizer):
            norms = optimizer.norms(self.parameters)
        else:
            norms = {name: norm([p.grad for p in own]).item() for name, own in self.parameters.items()}
        idle = [name for name, own in norms.items() if own == 0 and name not in self.idle]
        if idle and any(norms.values()):
            self.idle.update(idle)
            warnings.warn(
                f"no trained denoising step called {idle[0]} at optimizer step {step}, so its adapter got no "
                "gradient. Where that is always so, let the trained steps reach its part of the schedule "
                "(sde_window_range, last_steps, train_levels), or leave it out of lora_denoisers.", stacklevel=2,
            )
        return norms
