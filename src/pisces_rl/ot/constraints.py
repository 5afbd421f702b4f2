"""Constraints on the marginals of a plan, one class per kind.

A plan is P_ij = alpha_i beta_j exp((f_i + g_j + l - C_ij) / eps) for reference weights alpha and beta. Block ascent
of the dual updates one potential at a time. In units of eps, with r_i = sum_j beta_j exp((g_j + l - C_ij) / eps),

    f_i / eps = step(log(a_i / alpha_i) - log r_i)

`update` is all that differs between kinds. It maps the candidate, minus an offset `rest`, to the new f_i / eps minus
the same offset, so that a large offset costs no precision. `residual` is the L1 distance of a marginal from its
optimality condition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balanced:
    """P 1 = a and P^T 1 = b."""

    mass: None = None

    def __getitem__(self, rows: Tensor) -> "Balanced":
        return self

    def update(self, candidate: Tensor, rest: Tensor, eps: float) -> Tensor:
        return candidate

    def residual(self, marginal: Tensor, weights: Tensor, scaled: Tensor, eps: float) -> Tensor:
        return (marginal - weights).abs().sum(1)

    def dual(self, weights: Tensor, potential: Tensor) -> Tensor:
        return (weights * potential).sum(1)


@dataclass(frozen=True)
class Penalised:
    """rho KL(P 1 | a) + rho KL(P^T 1 | b): at the optimum P 1 = a exp(-f / rho)."""

    rho: float
    mass: None = None

    def __getitem__(self, rows: Tensor) -> "Penalised":
        return self

    def update(self, candidate: Tensor, rest: Tensor, eps: float) -> Tensor:
        return (self.rho * candidate - eps * rest) / (self.rho + eps)

    def residual(self, marginal: Tensor, weights: Tensor, scaled: Tensor, eps: float) -> Tensor:
        return (marginal - weights * (-scaled * (eps / self.rho)).exp()).abs().sum(1)

    def translation(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor, eps: float) -> Tensor:
        """Return the t (B, 1) that makes (x + t, y - t) optimal. The plan is unchanged, but large rho needs it to
        converge quickly.

        Source: Sejourne et al. (arXiv 2201.00730), section 3.
        """
        share = eps / self.rho
        of_a = (a.double().log() - share * x.double()).logsumexp(1, keepdim=True)
        of_b = (b.double().log() - share * y.double()).logsumexp(1, keepdim=True)
        step = (of_a - of_b) / (2 * share)  # fp64: a small difference over a small share
        return torch.where(step.isfinite(), step, 0.0).to(x)

    def dual(self, weights: Tensor, potential: Tensor) -> Tensor:
        return -self.rho * (weights * torch.expm1(-potential / self.rho)).sum(1)


@dataclass(frozen=True)
class Bounded:
    """P 1 <= a, P^T 1 <= b and sum P = mass, (B,): f <= 0, and a row with f < 0 attains its bound."""

    mass: Tensor

    def __getitem__(self, rows: Tensor) -> "Bounded":
        """Select some of the problems."""
        return Bounded(self.mass[rows])

    def update(self, candidate: Tensor, rest: Tensor, eps: float) -> Tensor:
        return torch.minimum(candidate, -rest)

    def residual(self, marginal: Tensor, weights: Tensor, scaled: Tensor, eps: float) -> Tensor:
        excess = marginal - weights
        return torch.where(scaled < 0, excess.abs(), excess.clamp_min(0)).sum(1)

    def dual(self, weights: Tensor, potential: Tensor) -> Tensor:
        return (weights * potential).sum(1)


Constraint = Balanced | Penalised | Bounded
