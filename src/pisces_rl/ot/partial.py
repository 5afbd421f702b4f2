"""Transport of a part of the mass: two problems that deserve the name, and the iteration that the PISCES paper prints.

The three differ at any finite reg, and none is an approximation of another: see docs/ot.md for how far apart they are.
"""

import math
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
WHOLE = 1e-6  # a mass that lacks less than this share of both sides is all of it


@dataclass(frozen=True)
class PiscesPlan:
    """What the published iteration came to: plan (B, N, M), iterations (B,), and change (B,), the last step of log u,
    below the tolerance where it stopped by itself. Without B where the cost had none."""

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

    by block ascent of its dual in f <= 0, g <= 0 and the multiplier l of the mass, which is Dykstra's algorithm in the
    log domain. P_ij = R_ij exp((f_i + g_j + l - C_ij) / reg); `potential_a` holds f + l. Where the mass is all of both
    sides', the problem is the balanced one and solved as such; a little below that the ascent is slow (mass .99 takes
    some 300 iterations where .9 takes 40). Other arguments, errors and warnings as `transport_plan`.

    Args:
        mass: a number or (B,), at most min(|a|, |b|), in units of the weights.
        reference: R. "product": a b^T. "uniform": 1 on every cell with positive weights, as POT's
            `entropic_partial_wasserstein` solves.
        solver: "native"; "geomloss" solves only a mass that is all of both sides', any other is a ValueError.

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

    def fields(rows: Tensor, bounded: bool) -> list[Tensor]:
        constraint = Bounded(mass[rows]) if bounded else Balanced()
        if reference == "product":
            part = _Problems(problems.cost.detach()[rows], problems.a[rows], problems.b[rows], True, problems.slack)
            return part.fields(float(reg), constraint, tolerance, max_iterations, solver)
        part = masked[rows]
        part.alpha, part.beta = (part.a > 0).to(part.a), (part.b > 0).to(part.b)
        return solve_checked(part, float(reg), constraint, tolerance, max_iterations, solver, stacklevel=4)

    parts = [
        (rows.nonzero()[:, 0], bounded)
        for rows, bounded, any_ in ((whole, False, some), (~whole, True, others))
        if any_
    ]
    solved = []
    for rows, bounded in parts:
        solved.append(fields(rows, bounded))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return problems.finish(*(torch.cat(columns)[order] for columns in zip(*solved)), tolerance)


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
    """Partial transport through one dummy point a side: balanced entropic transport of the extended problem.

    The dummy row has weight |b| - mass, the dummy column |a| - mass, both at cost 0 to every point; dummy to dummy is
    forbidden, so `mass` moves between real points, to within the tolerance times the total weight:

        min_P <P, C> + reg KL(P' | a' b'^T)    with P' 1 = a', P'^T 1 = b', P the real block of P'

    The entropy also counts what each point leaves to the dummy, which `partial_transport_plan` leaves free; at reg ->
    0 both solve the same problem. `plan`, potentials and gradient are of the real block, the value is the extended
    problem's. Arguments as `partial_transport_plan`, with either `solver`. Source: Chapel et al. 2020 (arXiv
    2002.08276) for the extension.
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
    return problems.finish(plan, value, error, iterations, f, g, tolerance)


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
    """The iteration that the PISCES paper prints for its partial transport: for fidelity.

        log u <- mass (log a - LSE_j(-C / reg + log v)),   log v <- mass (log b - LSE_i(-C / reg + log u)),
        P = u exp(-C / reg) v

    from log v = 0, until log u moves by less than the tolerance. It does NOT transport the mass `mass`: what it
    solves is KL-unbalanced transport with counting reference and penalties rho = reg mass / (1 - mass), whose total
    mass can exceed 1; at mass 1 it is Sinkhorn's iteration. Neither marginals nor total are guaranteed.
    Row-normalised it equals the row-normalised `transport_plan(reach=rho)` of product reference. Weights and errors
    as `transport_plan`; without gradients. Source: arXiv 2602.01624, section 4.2.
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
    """(B,), 0 for empty problems; adds flags of its own."""
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
    batch.flags["mass: more than min(|a|, |b|), the mass that the marginals allow."] = (
        live & (mass > most * (1 + 1e-6))
    ).any()
    return torch.where(live, torch.minimum(mass, most), 0.0)
