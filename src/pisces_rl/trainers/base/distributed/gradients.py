"""The adapter's gradients: averaged over processes in few messages; their norms, denoiser by denoiser."""

import warnings

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ....policy import held, norm
from .zero import MESSAGE, PartitionedOptimizer


def average_gradients(
    adapter: dict[str, nn.Parameter], accelerator: Accelerator, context_parallel: int, optimizer: Optimizer
) -> None:
    """The mean over videos, of the sum over the `context_parallel` processes that share a video's tokens.

    A gradient that is None becomes 0 where another one is not: the optimizer then takes the same step on one process
    as on several. Where all are 0 on all processes, as of rewards without spread, they all become None, with which an
    optimizer moves nothing, neither by its momentum nor by its decay. An optimizer in parts reduces them itself. Those
    of weights in parts were averaged by each backward.
    """
    if not _any_gradient(adapter, accelerator):
        for parameter in adapter.values():
            parameter.grad = None
        return
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


def _any_gradient(adapter: dict[str, nn.Parameter], accelerator: Accelerator) -> bool:
    """Whether a number of any gradient on any process is not 0; all processes must call."""
    own = [held(p.grad).any() for p in adapter.values() if p.grad is not None]
    found = torch.stack(own).any() if own else torch.zeros((), device=accelerator.device)
    return bool(accelerator.reduce(found.float().to(accelerator.device), reduction="sum") > 0)


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
            gradients = {name: [p.grad for p in own if p.grad is not None] for name, own in self.parameters.items()}
            norms = {name: norm(own).item() if own else 0.0 for name, own in gradients.items()}
        idle = [name for name, own in norms.items() if own == 0 and name not in self.idle]
        if idle and any(norms.values()):
            self.idle.update(idle)
            warnings.warn(
                f"no trained denoising step called {idle[0]} at optimizer step {step}, so its adapter got no "
                "gradient. Where that is always so, let the trained steps reach its part of the schedule "
                "(sde_window_range, last_steps, train_levels), or leave it out of lora_denoisers.",
                stacklevel=2,
            )
        return norms
