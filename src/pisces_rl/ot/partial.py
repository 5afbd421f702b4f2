"""Transport of part of the mass: two well-defined problems, and the iteration that the PISCES paper prints.

The three differ at any finite reg, and none approximates another; docs/ot.md measures how far apart they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pisces_rl.ot.constraints import Balanced, Bounded
from pisces_rl.ot.plans import (
    BAD_COST,
    Masked,
    TransportPlan,
    _Problems,
    check_count,
    check_positive,
    check_resolution,
    check_solver,
    solve_checked,
)
from pisces_rl.ot.solver import full_precision

REFERENCES = ("product", "uniform")
WHOLE = 1e-6  # a mass within this relative distance of both sides' masses counts as all of it


@dataclass(frozen=True)
class PiscesPlan:
    """Result of the published iteration: plan (B, N, M), iterations (B,), and change (B,), the last step of log u.

    A converged iteration has a change below the tolerance. Without a batch axis if the cost had none.
    """

    plan: Tensor
    iterations: Tensor
    change: Tensor


def partial_transport_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    mass: float | Tensor,
    reg: float,
    reference: str = "product",
    tolerance: float = 1e-5,
    max_iterations: int = 5000,
    solver: str = "native",
) -> TransportPlan:
    """Entropic partial transport: the best plan of a given mass under both marginals.

        min_P <P, C> + reg KL(P | R)    with P 1 <= a, P^T 1 <= b, sum P = mass

    Solved by block ascent of its dual in f <= 0, g <= 0 and the multiplier l of the mass, which is Dykstra's algorithm
    in the log domain. P_ij = R_ij exp((f_i + g_j + l - C_ij) / reg); `potential_a` holds f + l. If `mass` is all of
    both sides' mass, the problem is balanced and solved as such. Slightly below that the ascent is slow: mass .99
    takes about 300 iterations, .9 takes 40. Other arguments, errors and warnings as in `transport_plan`.

    Args:
        mass: a number or (B,), at most min(|a|, |b|), in units of the weights.
        reference: R. "product": a b^T. "uniform": 1 on every cell with positive weights, as in POT's
            `entropic_partial_wasserstein`.
        solver: "native". "geomloss" solves only a mass that is all of both sides'; any other raises a ValueError.

    Source: Benamou et al. 2015 (arXiv 1412.5154), section 5.
    """
    check_positive(reg=reg, tolerance=tolerance)
    check_count(max_iterations=max_iterations)
    check_solver(solver)
    if reference not in REFERENCES:
        raise ValueError(f"reference={reference!r}: expected one of {', '.join(REFERENCES)}.")
    problems = _Problems.of(cost, a, b)
    masked = problems.masked()
    mass = _mass(masked, mass)
    most = torch.maximum(masked.a.sum(1), masked.b.sum(1))
    whole = masked.empty | (mass >= most * (1 - WHOLE))
    some, others = masked.check(whole.any(), (~whole).any())

    def fields(rows: Tensor, bounded: bool) -> Sequence[Tensor]:
        constraint = Bounded(mass[rows]) if bounded else Balanced()
        if reference == "product":
            part = _Problems(problems.cost.detach()[rows], problems.a[rows], problems.b[rows], True, problems.slack)
            return part.fields(float(reg), constraint, tolerance, max_iterations, solver)
        cells = masked[rows]
        cells.alpha, cells.beta = (cells.a > 0).to(cells.a), (cells.b > 0).to(cells.b)
        return solve_checked(cells, float(reg), constraint, tolerance, max_iterations, solver, stacklevel=4)

    parts = [
        (rows.nonzero()[:, 0], bounded)
        for rows, bounded, any_ in ((whole, False, some), (~whole, True, others))
        if any_
    ]
    solved = []
    for rows, bounded in parts:
        solved.append(fields(rows, bounded))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return problems.finish([torch.cat(columns)[order] for columns in zip(*solved)], tolerance)


def dummy_point_transport_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    mass: float | Tensor,
    reg: float,
    tolerance: float = 1e-5,
    max_iterations: int = 5000,
    solver: str = "native",
) -> TransportPlan:
    """Partial transport through one dummy point per side: balanced entropic transport of the extended problem.

    The dummy row has weight |b| - mass, the dummy column |a| - mass. Both cost 0 to every real point, and mass cannot
    move from dummy to dummy, so `mass` moves between real points, to within the tolerance times the total weight:

        min_P <P, C> + reg KL(P' | a' b'^T)    with P' 1 = a', P'^T 1 = b', P the real block of P'

    The entropy also counts what each point sends to the dummy, which `partial_transport_plan` does not count; as reg
    -> 0 both solve the same problem. `plan`, potentials and gradient belong to the real block, the value to the
    extended problem. Arguments as in `partial_transport_plan`, with either `solver`. Source of the extension: Chapel
    et al. 2020 (arXiv 2002.08276).
    """
    check_positive(reg=reg, tolerance=tolerance)
    check_count(max_iterations=max_iterations)
    check_solver(solver)
    problems = _Problems.of(cost, a, b)
    masked = problems.masked()
    masked.flags.setdefault(BAD_COST, ~masked.cost.isfinite().all())
    mass = _mass(masked, mass)
    _, rows, columns = masked.cost.shape
    a = torch.cat([masked.a, (masked.b.sum(1) - mass).clamp_min(0)[:, None]], 1)
    b = torch.cat([masked.b, (masked.a.sum(1) - mass).clamp_min(0)[:, None]], 1)
    cost = torch.nn.functional.pad(masked.cost, (0, 1, 0, 1), value=math.inf)
    cost[:, :-1, -1] = torch.where((masked.a > 0) & (b[:, -1:] > 0), 0.0, math.inf)
    cost[:, -1, :-1] = torch.where((masked.b > 0) & (a[:, -1:] > 0), 0.0, math.inf)
    extended = Masked(cost, a, b, a, b, masked.empty, False, masked.flags, masked.slack)
    plan, value, error, iterations, f, g = solve_checked(
        extended, float(reg), Balanced(), tolerance, max_iterations, solver, stacklevel=3
    )
    plan, f, g = plan[:, :rows, :columns], f[:, :rows], g[:, :columns]
    return problems.finish((plan, value, error, iterations, f, g), tolerance)


def pisces_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    mass: float = 0.9,
    reg: float = 0.05,
    max_iterations: int = 200,
    tolerance: float = 1e-3,
) -> PiscesPlan:
    """The partial-transport iteration exactly as the PISCES paper prints it, for reproduction.

        log u <- mass (log a - LSE_j(-C / reg + log v)),   log v <- mass (log b - LSE_i(-C / reg + log u)),
        P = u exp(-C / reg) v

    It starts from log v = 0 and stops once log u moves by less than the tolerance. It does NOT transport the mass
    `mass`: it solves KL-unbalanced transport with counting reference and penalties rho = reg mass / (1 - mass), whose
    total mass can exceed 1; at mass 1 it is Sinkhorn's iteration. Neither the marginals nor the total are guaranteed.
    After row normalisation it equals the row-normalised `transport_plan(reach=rho)` with product reference. Weights
    and errors as in `transport_plan`; no gradients. Source: arXiv 2602.01624, section 4.2.
    """
    check_positive(reg=reg, tolerance=tolerance, mass=mass)
    check_count(max_iterations=max_iterations)
    if mass > 1:
        raise ValueError(f"mass={mass}: expected a share of at most 1.")
    problems = _Problems.of(cost, a, b)
    batch = problems.masked()
    batch.flags.setdefault(BAD_COST, ~batch.cost.isfinite().all())
    finite = batch.cost.isfinite()
    high, low = (torch.where(finite, batch.cost, fill).flatten(1) for fill in (-math.inf, math.inf))
    (ratio,) = batch.check(((high.amax(1) - low.amin(1)).amax() / reg).clamp_min(0))
    check_resolution(ratio, reg, batch.cost.dtype)
    with full_precision(batch.cost.device):
        log_kernel = -batch.cost / reg
        rows, columns = (batch.a > 0) & ~batch.empty[:, None], (batch.b > 0) & ~batch.empty[:, None]
        log_a = torch.where(rows, batch.a, 1.0).log()
        log_b = torch.where(columns, batch.b, 1.0).log()
        log_u, log_v = torch.zeros_like(batch.a), torch.zeros_like(batch.b)
        active = ~batch.empty[:, None]
        change, taken = torch.zeros_like(active, dtype=batch.a.dtype), torch.zeros_like(active[:, 0], dtype=torch.long)
        for iteration in range(max_iterations):
            u = mass * (log_a - (log_kernel + log_v[:, None, :]).logsumexp(2))
            u = torch.where(active & rows, u, log_u)
            v = mass * (log_b - (log_kernel + u[:, :, None]).logsumexp(1))
            log_v = torch.where(active & columns, v, log_v)
            taken += active[:, 0]
            change = torch.where(active, (u - log_u).abs().amax(1, keepdim=True), change)
            active = active & (change >= tolerance)
            log_u = u
            if iteration % 5 == 4 and not bool(active.any()):
                break
        plan = (log_kernel + log_u[:, :, None] + log_v[:, None, :]).exp()
        plan = torch.where(rows[:, :, None] & columns[:, None, :], plan, 0.0)
    fields = plan, taken, change[:, 0]
    return PiscesPlan(*(fields if problems.batched else (x[0] for x in fields)))


def _mass(batch: Masked, mass: float | Tensor) -> Tensor:
    """Return the mass as (B,), 0 for empty problems; adds the checks on `mass` to `batch.flags`."""
    count = batch.cost.shape[0]
    if isinstance(mass, Tensor):
        if mass.ndim > 1 or mass.numel() not in (1, count):
            raise ValueError(f"mass: expected a number or ({count},), got {tuple(mass.shape)}.")
        mass = mass.detach().to(batch.a).expand(count)
    else:
        check_positive(mass=mass)
        mass = batch.a.new_full((count,), float(mass))
    most = torch.minimum(batch.a.sum(1), batch.b.sum(1))
    live = ~batch.empty
    batch.flags["mass: expected > 0."] = (live & ~(mass > 0)).any()
    batch.flags["mass: exceeds min(|a|, |b|), the most that the marginals allow."] = (
        live & (mass > most * (1 + 1e-6))
    ).any()
    return torch.where(live, torch.minimum(mass, most), 0.0)
