"""Debiased Sinkhorn divergence between groups of points and a fixed bank, with each point's share of it."""

import warnings
from typing import Any

import torch
from torch import Tensor

from pisces_rl.ot import geomloss_solver
from pisces_rl.ot.costs import as_float, squared_cost
from pisces_rl.ot.plans import ConvergenceWarning, TransportPlan, check_positive, check_solver, transport_plan
from pisces_rl.ot.solver import full_precision

CHUNK_CELLS = 2**26  # costs held at once for the bank's self term: 256 MiB in fp32


class BankDivergence:
    """S(x, bank) = OT(x, bank) - OT(x, x) / 2 - OT(bank, bank) / 2 + eps (|a| - 1)^2 / 2 for groups x of points.

    The last term is 0 except for penalised groups whose weights a do not sum to the bank's 1.

    OT is the entropic value of `transport_plan` for the cost |x - y|^2 / 2 at eps = blur^2 (and rho = reach^2 if
    penalised), solved to its tolerance. It uses no annealing schedule and no diameter, so a group has the same
    divergence in any batch. Equals geomloss's `SamplesLoss(p=2, blur=, reach=, debias=True)` as its `scaling`
    approaches 1.

    OT(bank, bank) is solved once, on creation, in chunks of rows: memory grows with the bank, not with its square.

    Even a group drawn from the bank has a positive divergence, larger for smaller groups. `calibrate` measures that
    floor and `relative` divides by it.

    Args:
        bank: (M, D), without gradients.
        weights: (M,), normalised to total 1; default: uniform.
        blur: length > 0, in units of the points, below which points are not distinguished.
        reach: length beyond which mass is created or destroyed rather than moved; None: all mass is moved.
        tolerance: L1 marginal error of every term.
        max_iterations: limit for every term.
        solver: for every term, "native" or "geomloss". For the bank's self term geomloss holds about five (M, M) cost
            matrices, or with pykeops none above 5,000 points; without it, a bank that does not fit is a ValueError.

    `self_error` is the marginal error of the bank's self term; if it exceeds the tolerance, a `ConvergenceWarning` is
    issued.

    Source: Feydy et al. 2019 (arXiv 1810.08278); Sejourne et al. 2019 (arXiv 1910.12958) for `reach`.
    """

    identifying = ("bank", "weights", "settings")  # quantities derived from these differ in the last bits by device

    def __init__(
        self,
        bank: Tensor,
        *,
        blur: float,
        reach: float | None = None,
        weights: Tensor | None = None,
        tolerance: float = 1e-5,
        max_iterations: int = 5000,
        solver: str = "native",
    ):
        check_positive(blur=blur, tolerance=tolerance)
        check_solver(solver)
        if reach is not None:
            check_positive(reach=reach)
        if not (isinstance(max_iterations, int) and max_iterations > 0):
            raise ValueError(f"max_iterations={max_iterations!r}: expected an integer > 0.")
        if bank.ndim != 2 or 0 in bank.shape or not bank.isfinite().all():
            raise ValueError(f"bank: expected finite points (M, D), got {tuple(bank.shape)}.")
        self.bank = as_float(bank.detach())
        self.weights = torch.full_like(self.bank[:, 0], 1 / len(bank)) if weights is None else weights.to(self.bank)
        fine = self.weights.shape == (len(bank),) and self.weights.isfinite().all() and (self.weights >= 0).all()
        if not fine or not self.weights.sum() > 0:
            raise ValueError(
                f"weights: expected ({len(bank)},) finite numbers >= 0, not all 0, got {tuple(self.weights.shape)}."
            )
        self.weights = self.weights / self.weights.sum()
        self.settings: dict[str, Any] = dict(
            reg=blur**2,
            reach=None if reach is None else reach**2,
            tolerance=tolerance,
            max_iterations=max_iterations,
            solver=solver,
        )
        self.self_potential, self.self_value, self.self_error = self._solve_bank()
        self.floor: dict[int, tuple[float, float]] = {}

    def __call__(self, x: Tensor, a: Tensor | None = None) -> Tensor:
        """Return S, (B,) for groups x (B, n, D) or a scalar for (n, D), differentiable with respect to x.

        Args:
            x: (B, n, D) or (n, D), the points.
            a: (B, n) or (n,), weights of the points; zero is padding. Default: uniform.
        """
        groups, a, batched = self._groups(x, a)
        value = self._value(a, *self._plans(groups, a))
        return value if batched else value[0]

    def _value(self, a: Tensor, across: TransportPlan, within: TransportPlan) -> Tensor:
        mass = a.sum(1)
        value = across.value - within.value / 2 - self.self_value / 2 + self.settings["reg"] * (mass - 1) ** 2 / 2
        return torch.where(mass > 0, value, 0.0)

    def per_sample(self, x: Tensor, a: Tensor | None = None) -> Tensor:
        """Return F_i, (B, n) or (n,): the divergence's first variation dS / da_i at each point.

        Balanced: F = f_xy - f_xx, which is defined up to a constant, chosen so that the a-weighted mean of F equals S.
        Penalised: F = (rho + eps) (exp(-f_xx / rho) - exp(-f_xy / rho)).
        """
        groups, a, batched = self._groups(x.detach(), a)
        across, within = self._plans(groups, a)
        rho = self.settings["reach"]
        if rho is None:
            credit = across.potential_a - within.potential_a
            credit = credit + (self._value(a, across, within) - (a * credit).sum(1))[:, None]
        else:
            parts = (torch.expm1(-plan.potential_a / rho) for plan in (within, across))
            credit = (rho + self.settings["reg"]) * (next(parts) - next(parts))
        credit = torch.where(a > 0, credit, 0.0)
        return credit if batched else credit[0]

    def calibrate(self, real: Tensor, group_size: int, draws: int = 64, seed: int = 0) -> tuple[float, float]:
        """Return and store mean and deviation of S over random groups of real points (n, D) outside the bank."""
        if not 1 <= group_size <= len(real):
            raise ValueError(f"group_size={group_size}: expected 1 to {len(real)}, the number of real points.")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.stack([torch.randperm(len(real), generator=generator)[:group_size] for _ in range(draws)])
        with torch.no_grad():
            values = torch.cat([self(as_float(real)[part.to(real.device)]) for part in rows.split(8)])
        self.floor[group_size] = float(values.mean()), float(values.std())
        return self.floor[group_size]

    def relative(self, x: Tensor) -> Tensor:
        """Return S(x) over the mean S of equally many real points: 1 means as close to the bank as real points are."""
        size = x.shape[-2]
        if size not in self.floor:
            raise RuntimeError(f"relative: no floor for groups of {size}; call calibrate(real, {size}) first.")
        return self(x) / self.floor[size][0]

    def _groups(self, x: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        if x.ndim not in (2, 3) or x.shape[-1] != self.bank.shape[1] or 0 in x.shape:
            raise ValueError(f"x: expected points (B, n, {self.bank.shape[1]}), got {tuple(x.shape)}.")
        groups = (x if x.ndim == 3 else x[None]).to(self.bank)
        if a is None:
            a = torch.full_like(groups[..., 0].detach(), 1 / groups.shape[1])
        elif a.shape != x.shape[:-1]:
            raise ValueError(f"a: expected {tuple(x.shape[:-1])}, got {tuple(a.shape)}.")
        a = a.to(groups).reshape(groups.shape[:2])
        real = (a > 0)[..., None]
        if not bool((groups.isfinite() | ~real).all()):
            raise ValueError("x: a point of positive weight is NaN or infinite.")
        # padding may hold anything, so move it to where it cannot widen the range of costs
        return torch.where(real, groups, self.bank.mean(0)), a, x.ndim == 3

    def _plans(self, groups: Tensor, a: Tensor) -> tuple[TransportPlan, TransportPlan]:
        across = transport_plan(squared_cost(groups, self.bank), a, self.weights, **self.settings)
        return across, transport_plan(squared_cost(groups, groups), a, a, **self.settings)

    def _solve_bank(self) -> tuple[Tensor, Tensor, float]:
        """Return the potential (M,), value and marginal error of OT(bank, bank)."""
        reg, rho = self.settings["reg"], self.settings["reach"]
        with full_precision(self.bank.device):
            native = self.settings["solver"] == "native"
            h, new, error = self._iterate_bank() if native else self._bank_by_geomloss()
            if not error <= self.settings["tolerance"]:
                warnings.warn(
                    f"the bank's self term misses the marginal error of {self.settings['tolerance']:g}: {error:.1e} "
                    f"after {self.settings['max_iterations']} iterations; raise blur or max_iterations.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
            moved = (self.weights * ((h - new) / reg).exp()).sum()
            if rho is None:
                value = 2 * (self.weights * h).sum()
            else:
                value = -2 * rho * (self.weights * torch.expm1(-h / rho)).sum()
        return h, value - reg * (moved - 1), error

    def _iterate_bank(self) -> tuple[Tensor, Tensor, float]:
        """Return the potential, its softmin and its marginal error, by the symmetric iteration from 0.

        Between a set and itself no annealing is needed. Near the solution, softmin maps an error e of h to -k e, with
        k in [0, 1] depending on the direction. A full step removes errors with k = 0 (distant points, large blur), an
        averaged step those with k = 1 (constants, close points), so the two alternate.
        """
        rho = self.settings["reach"]
        damping = 1.0 if rho is None else rho / (rho + self.settings["reg"])
        h = torch.zeros_like(self.weights)
        costs = squared_cost(self.bank, self.bank) if len(self.bank) ** 2 <= CHUNK_CELLS else None
        for iteration in range(self.settings["max_iterations"]):
            new, error = self._bank_error(h, costs)
            if error <= self.settings["tolerance"]:
                return h, new, error
            last, h = h, damping * new if iteration % 2 == 0 else (h + damping * new) / 2
        return last, new, error

    def _bank_by_geomloss(self) -> tuple[Tensor, Tensor, float]:
        """Do the same with geomloss, which restarts with twice the iterations until they suffice."""
        reg, rho, iterations = self.settings["reg"], self.settings["reach"], 6
        backend = geomloss_solver.backend_for(self.bank)
        while True:
            iterations = min(iterations, self.settings["max_iterations"])
            h = geomloss_solver.self_potential(self.bank, self.weights, reg, rho, iterations, backend)
            new, error = self._bank_error(h)
            if error <= self.settings["tolerance"] or iterations >= self.settings["max_iterations"]:
                return h, new, error
            iterations *= 2

    def _bank_error(self, h: Tensor, costs: Tensor | None = None) -> tuple[Tensor, float]:
        """Return the softmin of h, and the L1 distance of its plan's marginal from the optimality condition."""
        reg, rho = self.settings["reg"], self.settings["reach"]
        new = self._softmin(h, costs)
        target = 1.0 if rho is None else (-h / rho).exp()
        return new, float((self.weights * (((h - new) / reg).exp() - target).abs()).sum())

    def _softmin(self, h: Tensor, costs: Tensor | None) -> Tensor:
        """Return -eps LSE_j(log b_j + (h_j - C_ij) / eps) for every bank point; in chunks of rows if costs is None."""
        eps, rows = self.settings["reg"], max(1, CHUNK_CELLS // len(self.bank))
        shift = (self.weights.log() + h / eps)[None]
        chunks = (squared_cost(x, self.bank) for x in self.bank.split(rows)) if costs is None else (costs,)
        return torch.cat([-eps * torch.add(shift, cost, alpha=-1 / eps).logsumexp(1) for cost in chunks])
