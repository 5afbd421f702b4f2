"""Muon: SGD with momentum whose update matrices are orthogonalized."""

import math

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    r"""M <- momentum M + G;  W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) orth(G + momentum M).

    orth(X) = U V^T of X = U S V^T, approximated by five Newton-Schulz steps. The factor 0.2 sqrt(max(rows, columns))
    gives the update AdamW's root mean square, so that AdamW's learning rates apply. Convolution kernels are treated as
    matrices (out channels, everything else). Matrices of the same shape are orthogonalized together.

    Args:
        params: tensors with at least two dimensions.
        lr: learning rate.
        momentum: Nesterov momentum.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [p.grad for p in parameters]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, gradients)
                updates = torch._foreach_mul(buffers, group["momentum"])
                torch._foreach_add_(updates, gradients)
                matrices = orthogonalise(torch.stack(updates).flatten(2)).reshape(len(parameters), *shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * 0.2 * math.sqrt(max(shape[0], math.prod(shape[1:])))
                torch._foreach_add_(parameters, list(matrices.unbind(0)), alpha=-scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """(B, n, m) -> (B, n, m) with singular values near 1, by a quintic Newton-Schulz iteration; bf16 on CUDA."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()
