"""Entropic transport plans between weighted points, batched: balanced, KL-unbalanced and partial.

Throughout there are B problems of N x M cells: cost C (B, N, M) and weights a (B, N), b (B, M) >= 0. A zero weight is
padding: its row or column of the cost may hold anything and changes nothing. KL(P | R) = sum P log(P / R) - P + R.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pisces_rl.ot import fused, geomloss_solver
from pisces_rl.ot.constraints import Balanced, Constraint, Penalised
from pisces_rl.ot.costs import as_float
from pisces_rl.ot.scaling import scale
from pisces_rl.ot.solver import Start, annealing_stages, full_precision, solve

SOLVERS = {"native": solve, "geomloss": geomloss_solver.solve}
BAD_COST = "cost: NaN or infinite where both weights are positive."
MASS_TOLERANCE = 1e-4  # allowed relative difference between the two masses of a balanced problem
HALF_TOLERANCE = 1e-2  # the same for fp16 or bf16 weights
FAR = 64.0  # if the smallest cost exceeds this many reg, it is subtracted before anything is divided by reg
RESOLUTION = {torch.float32: 1e5, torch.float64: 1e12}  # largest meaningful (range of costs) / reg


class ConvergenceWarning(UserWarning):
    """A plan misses its tolerance; `marginal_error` says by how much."""


@dataclass(frozen=True)
class TransportPlan:
    """A batch of solved problems (without the batch axis if the cost had none).

    Attributes:
        plan: (B, N, M), P_ij, without gradients.
        value: (B,), the dual value in units of cost; its gradient with respect to the cost is the plan.
        marginal_error: (B,), L1 distance of both marginals from their optimality condition, relative to max(|a|, |b|).
        iterations: (B,), updates of both potentials at the final `reg`, counted for the last solver that was tried.
        potential_a: (B, N), f in units of cost; 0 at zero weights.
        potential_b: (B, M), g in units of cost; 0 at zero weights.
        tolerance: the requested marginal error.
    """

    plan: Tensor
    value: Tensor
    marginal_error: Tensor
    iterations: Tensor
    potential_a: Tensor
    potential_b: Tensor
    tolerance: float

    @property
    def converged(self) -> Tensor:
        return self.marginal_error <= self.tolerance


class _DualValue(torch.autograd.Function):
    """A value computed from the cost, with the plan as its gradient (envelope theorem)."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, value: Tensor, plan: Tensor) -> Tensor:
        ctx.save_for_backward(plan)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (plan,) = ctx.saved_tensors
        return gradient[:, None, None] * plan, None, None


def transport_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float,
    reach: float | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 5000,
    solver: str = "native",
) -> TransportPlan:
    """Entropic optimal transport, balanced or KL-unbalanced.

        min_P <P, C> + reg KL(P | a b^T)                                      with P 1 = a, P^T 1 = b      (reach None)
        min_P <P, C> + reg KL(P | a b^T) + reach KL(P 1 | a) + reach KL(P^T 1 | b)

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg). The value is the dual value: in the balanced case `<a, f> + <b, g> -
    reg (|P| - |a| |b|)`, which for probability weights is `<a, f> + <b, g>`. Computed in fp32 (fp64 for an fp64 cost)
    with autocast and TF32 off. Each problem iterates until its own error is below the tolerance.

    Args:
        cost: (B, N, M) or (N, M), finite where both weights are positive.
        a: (B, N), or (N,) shared by all problems; default: uniform with total 1. A problem with no weight at all in a
            or b (an empty prompt) has a zero plan.
        b: (B, M), or (M,) shared by all problems; default: uniform with total 1.
        reg: entropic regularisation eps > 0, in units of cost.
        reach: strength rho > 0 of the marginal penalties, in units of cost (for p = 2, the square of geomloss's
            `reach`).
        tolerance: L1 marginal error at which to stop, relative to max(|a|, |b|).
        max_iterations: limit at the final reg.
        solver: "native", or "geomloss", which takes several times as long to reach the same plan.

    Raises:
        ValueError: the input is not a transport problem.

    Warns:
        ConvergenceWarning: a plan misses the tolerance.

    Source: Cuturi 2013 (arXiv 1306.0895), Chizat et al. 2018 (arXiv 1607.05816), Feydy et al. 2019 (arXiv 1810.08278).
    """
    check_positive(reg=reg, tolerance=tolerance)
    check_count(max_iterations=max_iterations)
    check_solver(solver)
    if reach is not None:
        check_positive(reach=reach)
    problems = _Problems.of(cost, a, b)
    constraint = Balanced() if reach is None else Penalised(float(reach))
    return problems.solve(float(reg), constraint, tolerance, max_iterations, solver)


def transport_cost(cost: Tensor, plan: Tensor) -> Tensor:
    """Return `<C, P>` (B,) with the plan held fixed. Its gradient is the plan; its value lacks the entropy.

    The derivative of `<C, P(C)>` itself also has a term through P; this function leaves it out on purpose.
    """
    return (as_float(cost) * plan.detach()).sum((-1, -2))


@dataclass
class _Problems:
    """Inputs of checked shapes: cost (B, N, M) with its gradient history, a (B, N), b (B, M)."""

    cost: Tensor
    a: Tensor
    b: Tensor
    batched: bool
    slack: float = MASS_TOLERANCE
    uniform: bool = False  # both weights are the uniform default

    @staticmethod
    def of(cost: Tensor, a: Tensor | None, b: Tensor | None) -> "_Problems":
        if not isinstance(cost, Tensor) or cost.ndim not in (2, 3) or 0 in cost.shape:
            found = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
            raise ValueError(f"cost: expected a tensor (B, N, M) or (N, M) with no empty axis, got {found}.")
        batched = cost.ndim == 3
        cost = as_float(cost if batched else cost[None])
        half = any(isinstance(w, Tensor) and w.dtype in (torch.float16, torch.bfloat16) for w in (a, b))
        uniform = a is None and b is None
        a, b = _weights("a", a, cost, cost.shape[1]), _weights("b", b, cost, cost.shape[2])
        return _Problems(cost, a, b, batched, HALF_TOLERANCE if half else MASS_TOLERANCE, uniform)

    def solve(
        self, reg: float, constraint: Constraint, tolerance: float, max_iterations: int, solver: str
    ) -> TransportPlan:
        """Solve with product reference: the fused kernel where it applies, the general solver for the rest."""
        return self.finish(self.fields(reg, constraint, tolerance, max_iterations, solver), tolerance)

    def fields(
        self, reg: float, constraint: Constraint, tolerance: float, max_iterations: int, solver: str
    ) -> Sequence[Tensor]:
        """Return the fields of `TransportPlan`."""
        if solver != "native" or not fused.serves(self.cost, tolerance):
            return solve_checked(self.masked(), reg, constraint, tolerance, max_iterations, solver, stacklevel=5)
        with full_precision(self.cost.device):
            cost = self.cost.detach()
            fields: Sequence[Tensor] = fused.solve(cost, self.a, self.b, reg, constraint, tolerance, max_iterations)
            left = ~(fields[2].cpu() <= tolerance)  # the only synchronisation
            if left.any():
                left = left.nonzero()[:, 0].to(cost.device)
                rest = _Problems(cost[left], self.a[left], self.b[left], True, self.slack)
                solved = solve_checked(
                    rest.masked(), reg, constraint[left], tolerance, max_iterations, solver, stacklevel=5
                )
                fields = [all_.index_copy(0, left, some.to(all_)) for all_, some in zip(fields, solved)]
        return fields

    def masked(self) -> "Masked":
        if self.uniform:
            nothing = torch.zeros(len(self.a), dtype=torch.bool, device=self.a.device)
            return Masked(self.cost.detach(), self.a, self.b, self.a, self.b, nothing, True, {}, self.slack)
        return Masked.of(self.cost.detach(), self.a, self.b, self.slack)

    def finish(self, fields: Sequence[Tensor], tolerance: float) -> TransportPlan:
        plan, value, *rest = fields
        fields = (plan, _DualValue.apply(self.cost, value, plan), *rest)
        return TransportPlan(*(x if self.batched else x[0] for x in fields), tolerance)  # type: ignore[arg-type, call-arg]


@dataclass
class Masked:
    """Problems whose missing cells have infinite cost, with reference weights and pending input checks.

    empty: (B,), no cell at all. full: no cell is missing. flags: error messages with bools on the device, read once.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    alpha: Tensor
    beta: Tensor
    empty: Tensor
    full: bool
    flags: dict[str, Tensor]
    slack: float = MASS_TOLERANCE

    @staticmethod
    @torch.no_grad()
    def of(cost: Tensor, a: Tensor, b: Tensor, slack: float = MASS_TOLERANCE) -> "Masked":
        real_a, real_b = a > 0, b > 0
        flags = {
            "a: weights must be finite and >= 0.": ~((a >= 0) & a.isfinite()).all(),
            "b: weights must be finite and >= 0.": ~((b >= 0) & b.isfinite()).all(),
        }
        full = bool(real_a.all() & real_b.all())
        if not full:
            cells = real_a[:, :, None] & real_b[:, None, :]
            flags[BAD_COST] = (cells & ~cost.isfinite()).any()
            cost = torch.where(cells, cost, math.inf)
        return Masked(cost, a, b, a, b, ~(real_a.any(1) & real_b.any(1)), full, flags, slack)

    def __getitem__(self, rows: Tensor) -> "Masked":
        parts = (x[rows] for x in (self.cost, self.a, self.b, self.alpha, self.beta, self.empty))
        return Masked(*parts, self.full, {}, self.slack)  # type: ignore[arg-type, call-arg]

    def check(self, *extra: Tensor) -> list[float]:
        """Raise the first flagged error; return the values of the `extra` scalars, read in the same wait."""
        values = torch.stack([*(flag.to(self.a) for flag in self.flags.values()), *extra]).tolist()
        for text, wrong in zip(self.flags, values):
            if wrong:
                raise ValueError(text)
        return values[len(self.flags) :]


def solve_checked(
    problems: Masked,
    reg: float,
    constraint: Constraint,
    tolerance: float,
    max_iterations: int,
    solver: str,
    stacklevel: int,
) -> tuple[Tensor, ...]:
    """Return the fields of `TransportPlan` from one of `SOLVERS`, for any reference and any pattern of cells.

    `stacklevel` makes the warning point at the user's call.
    """
    with full_precision(problems.cost.device):
        fields, converged = _solve_checked(problems, reg, constraint, tolerance, max_iterations, solver)
    if not converged:
        error = fields[2]
        warnings.warn(
            f"{int((~(error <= tolerance)).sum())} of {len(error)} plans miss the marginal error of {tolerance:g}, "
            f"at worst {float(error.max()):.1e} after {max_iterations} iterations: raise reg or max_iterations.",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
    return fields


def _solve_checked(
    problems: Masked, reg: float, constraint: Constraint, tolerance: float, max_iterations: int, solver: str
) -> tuple[tuple[Tensor, ...], bool]:
    cost, a, b, live = problems.cost, problems.a, problems.b, ~problems.empty
    if isinstance(constraint, Balanced):
        of_a, of_b = a.sum(1), b.sum(1)
        text = "a, b: a balanced plan needs equal masses; pass reach=, or use partial_transport_plan."
        if problems.flags:  # otherwise the weights are the uniform default
            gap = (of_a - of_b).abs() > problems.slack * torch.maximum(of_a, of_b)
            problems.flags[text] = (gap & live).any()
        b = b * torch.where(live, of_a / of_b, 1.0)[:, None]  # remove the rounding difference between the masses
    begin = Start.of(cost, constraint, reg, problems.full)
    problems.flags.setdefault(BAD_COST, ~begin.span.isfinite().all())
    own_stages = annealing_stages(begin.span, reg, constraint)
    extremes = own_stages.amax(), own_stages.amin(), begin.span.amax() / reg, begin.l0.abs().amax() / reg
    stages, fewest, ratio, distance = problems.check(*extremes)
    check_resolution(ratio, reg, cost.dtype)
    # Solve problems that anneal apart from those that do not, so that neither group changes the other. geomloss has
    # one schedule per batch, so there each number of stages is a group.
    if stages != fewest and (solver == "geomloss" or not fewest):
        kinds = own_stages if solver == "geomloss" else own_stages > 0
        parts = [(kinds == kind).nonzero()[:, 0] for kind in kinds.unique()]
        solved = [
            _solve_checked(problems[rows], reg, constraint[rows], tolerance, max_iterations, solver) for rows in parts
        ]
        order = torch.cat(parts).argsort()
        return tuple(torch.cat(f)[order] for f in zip(*(f for f, _ in solved))), all(done for _, done in solved)
    alpha, beta, far = problems.alpha, problems.beta, distance > FAR
    plain = isinstance(constraint, Balanced) and problems.full and begin.flat and not (stages or far)
    if solver == "native" and plain:
        fields = _scaled_alone(cost, a, b, alpha, beta, begin.l0, reg, tolerance, max_iterations)
        if fields is not None:
            return fields, True
    solution = SOLVERS[solver](
        cost, a, b, alpha, beta, reg, constraint, begin, int(stages), far, tolerance, max_iterations
    )
    plan = solution.plan if problems.full else torch.where(live[:, None, None], solution.plan, 0.0)
    error = torch.where(live, solution.error, 0.0)
    f = torch.where((a > 0) & live[:, None], solution.f, 0.0)
    g = torch.where((b > 0) & live[:, None], solution.g, 0.0)
    value = constraint.dual(a, f) + constraint.dual(b, g)
    moved = b.sum(1) if isinstance(constraint, Balanced) else plan.sum((1, 2))
    if constraint.mass is not None:
        value = value + constraint.mass * solution.shift
        f = f + solution.shift[:, None] * (a > 0)
    value = torch.where(live, value - reg * (moved - alpha.sum(1) * beta.sum(1)), 0.0)
    return (plan, value, error, solution.iterations, f, g), solution.converged


def _scaled_alone(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor,
    low: Tensor,
    reg: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, ...] | None:
    """Solve balanced problems without padding on a fixed kernel; None if one kernel is not enough."""
    kernel = torch.add((low / reg)[:, :, None], cost, alpha=-1 / reg).exp_()
    scaled = scale(kernel, a, b, alpha, beta, tolerance, max_iterations, full=True)
    if bool(scaled.active.any()):
        return None
    f, g = low + reg * (scaled.q / alpha).log(), reg * (scaled.w / beta).log()
    plan = kernel.mul_(scaled.q[:, :, None]).mul_(scaled.w[:, None])
    value = (a * f).sum(1) + (b * g).sum(1) - reg * (b.sum(1) - alpha.sum(1) * beta.sum(1))
    return plan, value, scaled.error, scaled.iterations, f, g


def _weights(name: str, weights: Tensor | None, cost: Tensor, n: int) -> Tensor:
    batch = cost.shape[0]
    if weights is None:
        return cost.new_full((batch, n), 1 / n)
    if not isinstance(weights, Tensor) or tuple(weights.shape) not in ((n,), (batch, n)):
        found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name}: expected {(batch, n)} or {(n,)} for a cost of {tuple(cost.shape)}, got {found}.")
    if weights.requires_grad:
        raise ValueError(f"{name}: gradients flow to the cost only; pass {name}.detach().")
    return weights.to(cost).expand(batch, n)


def check_count(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer >= 1.")


def check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}.")


def check_resolution(ratio: float, reg: float, dtype: torch.dtype) -> None:
    if ratio > RESOLUTION[dtype]:
        raise ValueError(
            f"reg={reg:g} is {ratio:.0e} times smaller than the range of the costs, more than {dtype} resolves: raise "
            "reg, rescale the cost, or pass it in float64."
        )


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: expected a finite number > 0.")
