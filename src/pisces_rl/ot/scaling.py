"""Balanced problems as matrix scaling on one kernel, without logarithms; and over-relaxation of Sinkhorn."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

REBUILD = 30.0  # absorb once x, y or z exceeds this
SCALING_ITERATIONS = 40
CHECK_FACTOR = 1.2  # matrix scaling checks its error after 1, 2, ..., 6, 7, 8, 9, 10, 12, 14, 16, 19, ... iterations
RELAX_EVERY = 20
RELAX_LIMIT = 0.9995


def relax(relaxation: Tensor, rate: Tensor) -> Tensor:
    """Return the next over-relaxation w of balanced iterations, given the error's decay rate q under the current w.

    Near the solution Sinkhorn's iteration is block Gauss-Seidel, so its plain rate t satisfies (Young 1954)
    (q + w - 1)^2 = q w^2 t, and the best w is 2 / (1 + sqrt(1 - t)). If the error grows, w moves towards 1. Source:
    Thibault et al. (arXiv 1711.01851), Lehmann et al. (arXiv 2012.12562).
    """
    own = (rate + relaxation - 1).square() / (rate * relaxation.square()).clamp_min(1e-12)
    best = 2 / (1 + (1 - own.clamp(0, RELAX_LIMIT)).sqrt())
    slow = rate > relaxation - 1 + 1e-3
    return torch.where(
        rate < 1, torch.where(slow, torch.maximum(best, relaxation), relaxation), 1 + 0.9 * (relaxation - 1)
    )


@dataclass
class Scaled:
    """q (B, N), w (B, M); active (not converged), error, iterations (B,); done: iterations performed."""

    q: Tensor
    w: Tensor
    active: Tensor
    error: Tensor
    iterations: Tensor
    done: int


def scale(
    kernel: Tensor, a: Tensor, b: Tensor, q: Tensor, w: Tensor, tolerance: float, count: int, full: bool = False
) -> Scaled:
    """Solve balanced problems by matrix scaling, q = a / (K w), w = b / (K^T q), in up to `count` iterations.

    From `SCALING_ITERATIONS` on both are over-relaxed, q' = q (a / (q K w))^r, with one r per problem. The error is
    checked after updating q and before w, since its products are already available then. The result of a converged
    problem is saved while the batch continues; empty problems count as converged from the start. Scaling stops early
    once the scalings exceed what one kernel can hold. full: there is no padding.
    """
    tiny = torch.finfo(kernel.dtype).tiny
    total = a.sum(1).clamp_min(tiny)
    active = torch.ones_like(total, dtype=torch.bool) if full else (a > 0).any(1) & (b > 0).any(1)
    a, b, q, w = a[:, None], b[:, None], q[:, None], w[:, None]
    limit, transposed = math.exp(1.5 * REBUILD), kernel.mT
    left = torch.where(active, math.inf, torch.zeros_like(total))
    iterations = torch.zeros_like(total, dtype=torch.long)
    kept, relaxation, last = None if full else (q, w), None, None
    check = 1

    def scaled(old: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        new = weights / (sums if full else sums.clamp_min_(tiny))
        if relaxation is not None:
            new = old * (new / old).nan_to_num_(1.0).pow_(relaxation)
        return new.clamp_max_(limit)

    for done in range(1, count + 1):
        sums = torch.bmm(w, transposed)
        q = scaled(q, a, sums)
        own = torch.bmm(q, kernel)
        adapt = done >= SCALING_ITERATIONS and done % RELAX_EVERY == 0
        if done == check or adapt or done == count:
            check = max(done + 1, int(CHECK_FACTOR * done)) if done >= check else check
            wrong = (w * own).sub_(b).abs_().sum((1, 2))
            if relaxation is not None:
                wrong += (q * sums).sub_(a).abs_().sum((1, 2))
            wrong /= total
            finished = active & (wrong <= tolerance)
            if done == count or bool(finished.any() | ~active.any()):
                now = active[:, None, None]
                kept = (q, w) if kept is None else tuple(torch.where(now, *pair) for pair in zip((q, w), kept))
                left, iterations = torch.where(active, wrong, left), torch.where(active, done, iterations)
                active = active & ~finished
                if not bool(active.any()):
                    break
            if adapt:
                if bool((q.amax((1, 2)).log() + w.amax((1, 2)).log() > 2 * REBUILD)[active].any()):
                    break
                relaxation = (
                    torch.ones_like(a[:, :, :1])
                    if relaxation is None
                    else relax(relaxation[:, 0], (wrong / last)[:, None] ** (1 / RELAX_EVERY))[:, None]
                )
                last = wrong
        w = scaled(w, b, own)
    if kept is not None:
        now = active[:, None, None]
        q, w = (torch.where(now, *pair) for pair in zip((q, w), kept))
    return Scaled(q[:, 0], w[:, 0], active, left, iterations, done)
