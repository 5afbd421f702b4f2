"""The debiased entropic map, alone or on top of the linear one."""

from typing import Any

import torch
from torch import Tensor

from pisces_rl.ot.costs import squared_cost
from pisces_rl.ot.maps.closed_form import LinearMap
from pisces_rl.ot.maps.transport_map import TransportMap
from pisces_rl.ot.plans import transport_plan

CHUNK_CELLS = 2**26


class EntropicMap(TransportMap):
    """z + E[target | z] - E[source | z] under entropic plans, where z is the point or its linear image.

        T(x) = z + sum_j softmax_j((g_j - |z - y_j|^2 / 2) / eps) y_j
                 - sum_i softmax_i((h_i - |z - z_i|^2 / 2) / eps) z_i

    with z = L(x) for the linear map L, potentials g of the plan from the z_i to the targets y_j, and h of the plan
    from the z_i to themselves. The second sum removes the pull towards the mean of an entropic plan: as eps ->
    infinity, T becomes L plus a mean shift, whereas the plain barycentric projection would become a constant.

    Args:
        reg: eps as a share of the mean cost.
        linear: compose with `LinearMap`.
        points_kept: points kept per side; memory and time of the fit grow with its square.
        seed: for choosing these points.
        tolerance: L1 marginal error of the plans.

    Source: Pooladian and Niles-Weed 2021 (arXiv 2109.12004); the debiasing, Pooladian et al. 2022 (arXiv 2202.08919).
    """

    kind = "entropic"
    settings = ("reg", "linear", "points_kept", "seed", "tolerance")

    def __init__(
        self,
        reg: float = 0.1,
        linear: bool = True,
        points_kept: int = 4096,
        seed: int = 0,
        tolerance: float = 1e-3,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not reg > 0:
            raise ValueError(f"reg={reg}: expected a number > 0.")
        if points_kept < 2:
            raise ValueError(f"points_kept={points_kept}: expected at least 2.")
        self.reg, self.linear, self.points_kept, self.seed, self.tolerance = reg, linear, points_kept, seed, tolerance

    def _fit(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        tensors = {}
        if self.linear:
            inner = LinearMap()
            tensors = inner._fit(source, target)
            inner.tensors = tensors
            self.report = inner.report
            source = inner._map(source)
        generator = torch.Generator().manual_seed(self.seed)
        z = source[torch.randperm(len(source), generator=generator)[: self.points_kept]].float()
        y = target[torch.randperm(len(target), generator=generator)[: self.points_kept]].float()
        cost = squared_cost(z, y)
        eps = self.reg * float(cost.mean())
        if not eps > 0:
            raise ValueError("target: all points of both sides coincide, so no entropic map can be fitted.")
        across = transport_plan(cost, reg=eps, tolerance=self.tolerance)
        within = transport_plan(squared_cost(z, z), reg=eps, tolerance=self.tolerance)
        g, h = across.potential_b, (within.potential_a + within.potential_b) / 2
        return {**tensors, "z": z, "y": y, "g": g, "h": h, "eps": torch.tensor(eps)}

    def _map(self, x: Tensor) -> Tensor:
        if self.linear:
            x = (x - self.tensor("source_mean", x)) @ self.tensor("matrix", x).T + self.tensor("target_mean", x)
        eps = float(self.tensors["eps"])
        z, y, g, h = (self.tensor(name, x) for name in ("z", "y", "g", "h"))
        parts = []
        for part in x.split(max(1, CHUNK_CELLS // max(len(y), len(z)))):
            to_target = ((g - squared_cost(part, y)) / eps).softmax(1) @ y
            to_source = ((h - squared_cost(part, z)) / eps).softmax(1) @ z
            parts.append(part + to_target - to_source)
        return torch.cat(parts)
