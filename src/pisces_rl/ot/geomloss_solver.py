"""geomloss (Feydy et al. 2019, arXiv 1810.08278) as the solver for plans and for a bank's self term.

Both go through `geomloss.SamplesLoss`: plans use its batched "tensorized" loop, with the cost matrix passed through
`cost=`; a bank uses the loop that its size requires. geomloss's default schedule, from a diameter down to the blur,
never stays at the final eps, so its error falls only like one over the number of iterations, and
`geomloss.ot.solve_batch` has the same schedule. Iterations therefore run in blocks at one eps: a diameter just above
the blur, and a scaling just below 1.

Each block of plans starts where the last one ended, for which geomloss has no argument. Instead, with f = f0 + f' and
g = g0 + g', the problem for f', g' has the same form, with cost C - (1 + eps / rho) (f0 + g0) and weights
a exp(-f0 / rho), b exp(-g0 / rho); if balanced, rho is infinite. Only the gradients do not come from geomloss: they
follow from the envelope theorem, as for the native solver; geomloss's are off by a factor if marginals are penalised.
"""

import importlib.util
import math

import psutil
import torch
from torch import Tensor

from pisces_rl.ot.constraints import Bounded, Constraint, Penalised
from pisces_rl.ot.costs import squared_cost
from pisces_rl.ot.solver import STAGE_FACTOR, STAGE_ITERATIONS, Solution, Start

DRIFT = 1e-9  # relative change of the blur within a block of iterations at one eps
FIRST_BLOCK = 10
FORBIDDEN = 200.0  # a cell whose cost is this many eps too high has no mass in any precision
TENSORIZED_CELLS = 5000**2  # geomloss's limit
COPIES = 5  # cost matrices that the tensorized loop holds at its peak


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor,
    reg: float,
    constraint: Constraint,
    begin: Start,
    stages: int,
    far: bool,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Like `solver.solve`, for balanced and penalised plans that all need the same number of annealing stages."""
    if isinstance(constraint, Bounded):
        raise ValueError(
            "solver='geomloss' cannot solve plans of a bounded mass; use solver='native', dummy_point_transport_plan, "
            "or transport_plan(reach=)."
        )
    rho = constraint.rho if isinstance(constraint, Penalised) else math.inf
    exact = cost.double()  # offsets and sums in fp64: if costs span many eps, fp32 loses the significant digits
    f = torch.where(a > 0, (begin.f0 + begin.l0).double(), 0.0)
    g = torch.where(b > 0, begin.g0.double(), 0.0)
    active = ((a > 0).any(1) & (b > 0).any(1))[:, None]
    iterations = torch.zeros_like(active[:, 0], dtype=torch.long)
    done = 0
    while True:
        rest = exact - (1 + reg / rho) * (f[:, :, None] + g[:, None, :])
        high = torch.where(rest.isfinite(), rest, 0.0).amax((1, 2), keepdim=True)
        rest = torch.where(rest.isfinite(), rest, 2 * high.clamp_min(0) + FORBIDDEN * reg).to(cost)
        if stages:  # the first block, annealed like the native solver
            block, start, scaling = 0, reg * STAGE_FACTOR**stages, STAGE_FACTOR ** (-1 / STAGE_ITERATIONS)
            stages = 0
        else:
            block = min(max(FIRST_BLOCK, done // 2), max_iterations - done)
            start, scaling = _at_one_eps(reg, block)
        weights = ((w * (-z / rho).clamp(-80, 80).exp()).to(cost) for w, z in ((a, f), (b, g)))
        step_f, step_g = _iterate(rest, *weights, reg, rho, start, scaling)
        f = torch.where(active & (a > 0), f + step_f, f)
        g = torch.where(active & (b > 0), g + step_g, g)
        if isinstance(constraint, Penalised):
            step = reg * constraint.translation(a, f / reg, b, g / reg, reg)
            f = torch.where(active & (a > 0), f + step, f)
            g = torch.where(active & (b > 0), g - step, g)
        done += block
        plan = ((f[:, :, None] + g[:, None, :] - exact) / reg).exp().to(cost) * (a[:, :, None] * b[:, None, :])
        error = constraint.residual(plan.sum(2), a, (f / reg).to(cost), reg)
        error = error + constraint.residual(plan.sum(1), b, (g / reg).to(cost), reg)
        error = error / torch.maximum(a.sum(1), b.sum(1)).clamp_min(torch.finfo(cost.dtype).tiny)
        iterations = torch.where(active[:, 0], done, iterations)
        active = active & ~(error <= tolerance)[:, None]
        if done >= max_iterations or not bool(active.any()):
            break
    # geomloss's reference weights are a and b
    f, g = (z + torch.where(w > 0, reg * (w / of).log(), 0.0) for z, w, of in ((f, a, alpha), (g, b, beta)))
    shift = torch.zeros_like(error)
    return Solution(plan, f.to(cost), g.to(cost), shift, error, iterations, not bool(active.any()))


def _iterate(
    cost: Tensor, a: Tensor, b: Tensor, reg: float, rho: float, start: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return geomloss's potentials (B, N), (B, M) for costs (B, N, M), with eps going from `start` to `reg`."""
    rows, columns = cost.new_zeros(*a.shape, 1), cost.new_zeros(*b.shape, 1)  # placeholders for points
    transposed = cost.mT.contiguous()
    loss = _loss(
        p=1,
        blur=reg,
        reach=None if math.isinf(rho) else rho,
        diameter=start,
        scaling=scaling,
        backend="tensorized",
        cost=lambda first, _: cost if first.data_ptr() == rows.data_ptr() else transposed,
    )
    with torch.no_grad():  # geomloss leaves gradients enabled
        return loss(a, rows, b, columns)


def _loss(**settings):
    from geomloss import SamplesLoss  # slow: tries to import and thus compile KeOps

    return SamplesLoss("sinkhorn", debias=False, potentials=True, **settings)


def _at_one_eps(reg: float, iterations: int) -> tuple[float, float]:
    """Return the first eps and the scaling that reach `reg` in `iterations` steps from (1 + DRIFT) * `reg`."""
    # geomloss runs both end points, hence the 2
    return reg * (1 + DRIFT), (1 + DRIFT) ** (-1 / max(1, iterations - 2))


def self_potential(
    points: Tensor, weights: Tensor, reg: float, rho: float | None, iterations: int, backend: str
) -> Tensor:
    """Return h, (M,), of OT between points (M, D) with weights (M,) and themselves, for |x - y|^2 / 2, from h = 0."""
    start, scaling = _at_one_eps(reg, iterations)
    points = points - points.mean(0)
    loss = _loss(
        p=2,
        blur=math.sqrt(reg),
        reach=None if rho is None else math.sqrt(rho),
        diameter=math.sqrt(start),
        scaling=math.sqrt(scaling),
        backend=backend,
        cost=squared_cost if backend == "tensorized" else None,
    )
    with torch.no_grad():
        f, g = loss(weights, points, weights, points)
    return (f + g).flatten() / 2  # equal but for rounding


def backend_for(points: Tensor) -> str:
    """Return "tensorized" if the costs of points (M, D) fit into memory, else "online", which needs KeOps."""
    cells = len(points) ** 2
    if importlib.util.find_spec("pykeops") is not None:
        return "tensorized" if cells <= TENSORIZED_CELLS else "online"
    needed = COPIES * cells * points.element_size()
    if points.device.type == "cuda":
        free = torch.cuda.mem_get_info(points.device)[0]
        free += torch.cuda.memory_reserved(points.device) - torch.cuda.memory_allocated(points.device)
    else:
        free = psutil.virtual_memory().available
    if cells > TENSORIZED_CELLS and needed > free:
        raise ValueError(
            f"solver='geomloss': the costs of {len(points)} points need {needed / 1e9:.0f} GB, but only "
            f"{free / 1e9:.0f} GB are free; pip install pykeops, or use solver='native', neither of which holds them "
            "all at once."
        )
    return "tensorized"
