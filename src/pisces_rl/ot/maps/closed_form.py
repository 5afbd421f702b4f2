"""Closed-form maps: identity, mean shift, the linear map between Gaussians, and two controls for it: its output with
shuffled coordinates, and least squares over pairs."""

from typing import Any

import torch
from torch import Tensor

from pisces_rl.ot.maps.transport_map import TransportMap


class IdentityMap(TransportMap):
    """T(x) = x: the baseline for every other map."""

    kind = "identity"


class MeanShiftMap(TransportMap):
    """T(x) = x + mean(target) - mean(source)."""

    kind = "mean_shift"

    def _fit(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"shift": target.mean(0) - source.mean(0)}

    def _map(self, x: Tensor) -> Tensor:
        return x + self.tensor("shift", x)


class LinearMap(TransportMap):
    """The optimal map between Gaussians with the means and (shrunk) covariances of source and target.

        T(x) = m_t + A (x - m_s),    A = S_s^-1/2 (S_s^1/2 S_t S_s^1/2)^1/2 S_s^-1/2

    Args:
        shrinkage: s in S <- (1 - s) S + s (tr S / D) I. Default: the Ledoit-Wolf estimate for each side.

    Source: Bures; Peyre and Cuturi, Computational Optimal Transport, remark 2.31; Ledoit and Wolf 2004.
    """

    kind = "linear"
    settings = ("shrinkage",)

    def __init__(self, shrinkage: float | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage={shrinkage}: expected a number in [0, 1], or None.")
        self.shrinkage = shrinkage

    def _fit(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        covariance_s, share_s = shrunk_covariance(source, self.shrinkage)
        covariance_t, share_t = shrunk_covariance(target, self.shrinkage)
        self.report = {"shrinkage_source": share_s, "shrinkage_target": share_t}
        matrix = bures_matrix(covariance_s, covariance_t)
        return {"matrix": matrix, "source_mean": source.mean(0), "target_mean": target.mean(0)}

    def _map(self, x: Tensor) -> Tensor:
        return (x - self.tensor("source_mean", x)) @ self.tensor("matrix", x).T + self.tensor("target_mean", x)


class ShuffledMap(LinearMap):
    """The linear map with the coordinates of its output permuted: a control. Measures that only compare distances
    within each cloud (mutual-kNN, distances) cannot distinguish it from the linear map, yet it destroys the
    correspondence that a reward needs."""

    kind = "shuffled"

    def _fit(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = super()._fit(source, target)
        order = torch.randperm(source.shape[1], generator=torch.Generator().manual_seed(0))
        return found | {name: found[name][order] for name in ("matrix", "target_mean")}


class RegressedMap(TransportMap):
    """T(x) = W x + b by least squares over pairs: a comparison for transport. It does not preserve the spread.

    Args:
        ridge: r in min mean |W x + b - y|^2 + r tr(S_s) / D |W|^2.

    `fit` needs as many targets as sources; row i of both belong together.
    """

    kind = "regressed"
    settings = ("ridge",)

    def __init__(self, ridge: float = 1e-3, **kwargs: Any):
        super().__init__(**kwargs)
        if not ridge >= 0:
            raise ValueError(f"ridge={ridge}: expected a number >= 0.")
        self.ridge = ridge

    def _fit(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        if len(source) != len(target):
            raise ValueError(f"target: a regression needs pairs, got {len(source)} and {len(target)} points.")
        mean_s, mean_t = source.mean(0), target.mean(0)
        x, y = source - mean_s, target - mean_t
        covariance = x.T @ x / len(x)
        identity = torch.eye(x.shape[1], dtype=x.dtype)
        ridge = self.ridge * covariance.trace() / x.shape[1]
        matrix = torch.linalg.lstsq(covariance + ridge * identity, x.T @ y / len(x)).solution.T
        return {"matrix": matrix, "source_mean": mean_s, "target_mean": mean_t}

    def _map(self, x: Tensor) -> Tensor:
        return (x - self.tensor("source_mean", x)) @ self.tensor("matrix", x).T + self.tensor("target_mean", x)


def shrunk_covariance(x: Tensor, shrinkage: float | None = None) -> tuple[Tensor, float]:
    """Return the (D, D) covariance of points (n, D), shrunk towards a multiple of the identity, and the shrinkage.

    Default: the Ledoit-Wolf shrinkage, the squared error of S over its squared distance from that multiple.
    """
    x = x - x.mean(0)
    n, d = x.shape
    covariance = x.T @ x / n
    scale = covariance.trace() / d
    identity = torch.eye(d, dtype=x.dtype)
    if shrinkage is None:
        spread = (covariance - scale * identity).square().sum()
        noise = (x.square().sum(1).square().sum() / n - covariance.square().sum()) / n
        shrinkage = float((noise / spread.clamp_min(1e-300)).clamp(0, 1))
    return (1 - shrinkage) * covariance + shrinkage * scale * identity, shrinkage


def bures_matrix(source: Tensor, target: Tensor) -> Tensor:
    """Return the symmetric A with A source A = target; directions without source variance are mapped to 0."""
    root, inverse = _roots(source)
    middle, _ = _roots(root @ target @ root)
    return inverse @ middle @ inverse


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return square root and pseudo-inverse square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(0).sqrt()
    small = values <= values.max() * 1e-7
    inverse = torch.where(small, 0.0, 1 / torch.where(small, 1.0, values))
    return (vectors * values) @ vectors.T, (vectors * inverse) @ vectors.T
