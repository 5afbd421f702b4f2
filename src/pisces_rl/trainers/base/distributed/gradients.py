"""Average the adapter's gradients over processes, and compute their norm per denoiser."""

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
    """Average gradients over videos, after summing over the `context_parallel` processes that share a video's tokens.

    If some gradients are None and others are not, None becomes 0, so that the optimizer takes the same step on one
    process as on several. If all are 0 on all processes, for instance because rewards have no spread, all become None,
    so that the optimizer changes nothing, not even through momentum or weight decay. A `PartitionedOptimizer` reduces
    gradients itself; gradients of FSDP2-sharded weights were averaged in each backward pass.
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
    """Return whether any gradient on any process has a nonzero element; all processes must call this."""
    own = [held(p.grad).any() for p in adapter.values() if p.grad is not None]
    found = torch.stack(own).any() if own else torch.zeros((), device=accelerator.device)
    return bool(accelerator.reduce(found.float().to(accelerator.device), reduction="sum") > 0)


def _messages(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Group gradients into messages of at most `MESSAGE` elements, which bounds the memory of the flat copy.

    An adapter's gradients fit into one message; those of full fine-tuning need several.
    """
    messages, size = [[]], 0
    for gradient in gradients:
        size += gradient.numel()
        if messages[-1] and size > MESSAGE:
            messages.append([])
            size = gradient.numel()
        messages[-1].append(gradient)
    return messages


class ExpertGradients:
    """Gradient norms per denoiser; warns once about each denoiser that no trained denoising step called.

    Args:
        adapter: {"DENOISER.parameter": trained parameter}.
        names: names of the denoisers that are trained.
    """

    def __init__(self, adapter: dict[str, nn.Parameter], names: list[str]):
        self.parameters = {n: [p for key, p in adapter.items() if key.startswith(f"{n}.")] for n in names}
        self.idle: set[str] = set()  # denoisers already warned about

    def norms(self, step: int, optimizer: Optimizer) -> dict[str, float]:
        """Return {denoiser: norm of its gradient} at an optimizer step."""
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
                "gradient. If this holds for every step, let the trained steps reach its part of the schedule "
                "(sde_window_range, backprop_steps, train_levels), or leave it out of lora_denoisers.",
                stacklevel=2,
            )
        return norms
