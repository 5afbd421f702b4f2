"""The batched solver behind every plan: Sinkhorn's iteration on an absorbed kernel, with annealing if eps is small.

Potentials are f = f0 + eps x, g = g0 + eps y, l = l0 + eps z. The offsets f0, g0, l0 are absorbed into the kernel
K_ij = exp((f0_i + g0_j + l0 - C_ij) / eps), so that x, y, z stay near 0 (Schmitzer, arXiv 1610.06519). An iteration is
two batched matrix-vector products:

    x = update(log(a / alpha) - log(K (beta e^y)) - z),   y likewise with K^T,   z fixes the total to a given mass

If the costs minus their c-transform span more than `TRANSFORMED_RANGE` eps, the kernel would underflow. (Under a bound
no c-transform is allowed and the limit is `EXP_RANGE`.) Those problems are annealed: eps 4^k, ..., 4 eps, eps, and
each stage begins with iterations in the log domain.

Balanced problems whose kernel does not underflow need no logarithms: `scaling.scale`. Every problem of a batch follows
its own schedule and stops by its own error, so the rest of the batch does not change its result. Errors are read only
every few iterations, because each read waits for the device.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pisces_rl.ot.constraints import Balanced, Bounded, Constraint, Penalised
from pisces_rl.ot.costs import exact_products
from pisces_rl.ot.scaling import REBUILD, RELAX_EVERY, SCALING_ITERATIONS, relax, scale

EXP_RANGE = 60.0  # e^-60 times any relevant weight is far above the smallest float
#: After the c-transform each row and column has a cell of reduced cost 0, so distant cells may underflow harmlessly.
TRANSFORMED_RANGE = 120.0
STAGE_FACTOR = 4.0
STAGE_ITERATIONS = 6
BLOCK = 5


@dataclass
class Solution:
    """plan (B, N, M); f (B, N), g (B, M), shift (B,) in units of cost; error, iterations (B,); have all converged?"""

    plan: Tensor
    f: Tensor
    g: Tensor
    shift: Tensor
    error: Tensor
    iterations: Tensor
    converged: bool


@contextlib.contextmanager
def full_precision(device: torch.device):
    """Apply `exact_products` without gradients."""
    with exact_products(device), torch.no_grad():
        yield


@dataclass
class _Problem:
    cost: Tensor  # (B, N, M), inf for missing cells
    a: Tensor
    b: Tensor
    alpha: Tensor  # reference weights
    beta: Tensor
    constraint: Constraint

    @property
    def tiny(self) -> float:
        return torch.finfo(self.cost.dtype).tiny

    @cached_property
    def log_alpha(self) -> Tensor:
        return self.alpha.log()

    @cached_property
    def log_beta(self) -> Tensor:
        return self.beta.log()

    @cached_property
    def ratio_a(self) -> Tensor:
        return torch.where(self.a > 0, (self.a / self.alpha).log(), 0.0)

    @cached_property
    def ratio_b(self) -> Tensor:
        return torch.where(self.b > 0, (self.b / self.beta).log(), 0.0)


@dataclass
class _State:
    f0: Tensor  # offsets are fp64: if costs span many eps, fp32 would lose the significant digits
    g0: Tensor
    l0: Tensor  # (B, 1)
    x: Tensor
    y: Tensor
    z: Tensor  # (B, 1)
    precise: bool  # build kernels in fp64
    flat: bool  # g0 and l0 are 0
    base: Tensor  # (B, 1): part of f and g that is in neither offset, because their sum was subtracted from the costs

    def absorb(self, eps: float, which: Tensor | None = None) -> None:
        """Move x, y, z into the offsets for all problems, or for those in `which`, (B, 1) bool."""
        self.flat = False
        for offset, rest in (("f0", "x"), ("g0", "y"), ("l0", "z")):
            old, change = getattr(self, offset), getattr(self, rest)
            new, left = torch.add(old, change, alpha=eps), torch.zeros_like(change)
            setattr(self, offset, new if which is None else torch.where(which, new, old))
            setattr(self, rest, left if which is None else torch.where(which, left, change))

    def exponent(self, cost: Tensor, eps: float) -> Tensor:
        if self.precise:
            offsets = self.f0[:, :, None] + (self.g0 + self.l0)[:, None, :]
            return ((offsets - cost) / eps).to(cost)
        exponent = torch.add((self.f0 / eps).to(cost)[:, :, None], cost, alpha=-1 / eps)
        return exponent if self.flat else exponent.add_(((self.g0 + self.l0) / eps).to(cost)[:, None, :])

    def rows(self, eps: float) -> Tensor:
        """Return f / eps without x, (B, N)."""
        return ((self.f0 + self.base) / eps).to(self.x)

    def columns(self, eps: float) -> Tensor:
        return ((self.g0 + self.base) / eps).to(self.y)


def _times(kernel: Tensor, weights: Tensor) -> Tensor:
    """Return K w, (B, N). On a CPU, torch.bmm with a column is six times slower than with a row and K^T."""
    if kernel.device.type == "cpu":
        return torch.bmm(weights[:, None, :], kernel.mT)[:, 0, :]
    return torch.bmm(kernel, weights[:, :, None])[:, :, 0]


def _log_rows(problem: _Problem, kernel: Tensor, y: Tensor, log_domain: bool) -> Tensor:
    """Return log sum_j beta_j K_ij e^{y_j}, (B, N); in the log domain `kernel` holds its exponent."""
    if log_domain:
        return (kernel + (problem.log_beta + y)[:, None, :]).logsumexp(2).clamp_min(-1e30)
    return _times(kernel, problem.beta * y.exp()).clamp_min_(problem.tiny).log_()


def _log_columns(problem: _Problem, kernel: Tensor, x: Tensor, log_domain: bool) -> Tensor:
    if log_domain:
        return (kernel + (problem.log_alpha + x)[:, :, None]).logsumexp(1).clamp_min(-1e30)
    weights = (problem.alpha * x.exp())[:, None, :]
    return torch.bmm(weights, kernel)[:, 0, :].clamp_min(problem.tiny).log()


def _iterate(
    problem: _Problem,
    kernel: Tensor,
    state: _State,
    eps: float,
    active: Tensor,
    log_domain: bool,
    relaxation: Tensor | float = 1.0,
) -> None:
    """Update each potential of the active problems, (B, 1) bool, once."""
    update = problem.constraint.update
    candidate = problem.ratio_a - _log_rows(problem, kernel, state.y, log_domain)
    x = update(candidate - state.z, state.rows(eps), eps)
    state.x = torch.where(active & (problem.a > 0), state.x + relaxation * (x - state.x), state.x)
    log_columns = _log_columns(problem, kernel, state.x, log_domain)
    y = update(problem.ratio_b - log_columns - state.z, state.columns(eps), eps)
    state.y = torch.where(active & (problem.b > 0), state.y + relaxation * (y - state.y), state.y)
    if isinstance(problem.constraint, Penalised):
        step = problem.constraint.translation(
            problem.a, state.x + state.rows(eps), problem.b, state.y + state.columns(eps), eps
        )
        state.x, state.y = state.x + torch.where(active, step, 0.0), state.y - torch.where(active, step, 0.0)
    if problem.constraint.mass is not None:
        log_mass = (problem.log_beta + state.y + log_columns).logsumexp(1, keepdim=True)
        z = problem.constraint.mass.clamp_min(problem.tiny).log()[:, None] - log_mass
        state.z = torch.where(active & log_mass.isfinite(), z, state.z)


def _residual(problem: _Problem, kernel: Tensor, state: _State, eps: float) -> Tensor:
    """Return the L1 distance of both marginals from their optimality condition, (B,), relative to the mass."""
    rows = problem.alpha * (state.x + state.z + _log_rows(problem, kernel, state.y, False)).exp()
    columns = problem.beta * (state.y + state.z + _log_columns(problem, kernel, state.x, False)).exp()
    constraint = problem.constraint
    error = constraint.residual(rows, problem.a, state.x + state.rows(eps), eps)
    error = error + constraint.residual(columns, problem.b, state.y + state.columns(eps), eps)
    if constraint.mass is not None:
        error = error + (rows.sum(1) - constraint.mass).abs()
    return error / torch.maximum(problem.a.sum(1), problem.b.sum(1)).clamp_min(problem.tiny)


@dataclass
class Start:
    """Offsets f0 (B, N), g0 (B, M), l0 (B, 1), and the span (B,) of the reduced costs C - f0 - g0 - l0 >= 0.

    If the c-transform is needed to keep the kernel from underflow (and allowed: not under a bound), each row and each
    column keeps a cell of reduced cost 0. Otherwise the offset is each problem's smallest cost.
    """

    f0: Tensor
    g0: Tensor
    l0: Tensor
    span: Tensor
    flat: bool = True  # g0 is 0

    @staticmethod
    def of(cost: Tensor, constraint: Constraint, reg: float, full: bool) -> "Start":
        """Build the offsets. full: no cell is missing; a non-finite cost then makes the span non-finite."""
        f0, g0 = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
        low = _finite(cost.amin((1, 2)), full)
        high = (cost if full else torch.where(cost.isfinite(), cost, -math.inf)).amax((1, 2))
        span = high - low if full else _finite(high, full) - low
        needed = span > EXP_RANGE * reg
        if isinstance(constraint, Bounded) or not bool(needed.any()):
            return Start(f0, g0, low[:, None], span)
        f0 = _finite(cost.amin(2), full)
        reduced = cost - f0[:, :, None]
        g0 = _finite(reduced.amin(1), full)
        reduced -= g0[:, None, :]
        reduced = (reduced if full else torch.where(reduced.isfinite(), reduced, 0.0)).amax((1, 2))
        own = needed[:, None]  # decided per problem, independent of the batch
        f0, g0, l0 = torch.where(own, f0, 0.0), torch.where(own, g0, 0.0), torch.where(own, 0.0, low[:, None])
        return Start(f0, g0, l0, torch.where(needed, reduced, span), flat=False)


def _finite(x: Tensor, full: bool) -> Tensor:
    return x if full else torch.where(x.isfinite(), x, 0.0)


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
    """Solve B problems. `stages` is the largest number of annealing stages that any of them needs; `far` says whether
    the smallest costs are many eps away from 0."""
    bounded = isinstance(constraint, Bounded)
    base = torch.zeros_like(begin.l0, dtype=torch.float64)
    if stages == 0 and far:
        # exact if costs are similar, whereas dividing each by eps first would round
        cost, base = cost - begin.l0[:, :, None], begin.l0.double()
        begin = replace(begin, l0=torch.zeros_like(begin.l0))
    problem = _Problem(cost, a, b, alpha, beta, constraint)
    offsets = (offset.double() for offset in (begin.f0, begin.g0, begin.l0))
    rests = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(begin.l0)
    flat = begin.flat and stages == 0 and not bounded
    half = torch.zeros_like(base) if bounded else base / 2
    state = _State(*offsets, *rests, precise=stages > 0, flat=flat, base=half)
    if not bounded:  # only bounded plans have a multiplier for the mass
        state.f0, state.l0 = state.f0 + state.l0, torch.zeros_like(state.l0)
    own_stages = annealing_stages(begin.span, reg, constraint)[:, None]
    for stage in range(stages, 0, -1):
        _stage(problem, state, reg * STAGE_FACTOR**stage, own_stages >= stage, STAGE_ITERATIONS)
    if stages:
        _stage(problem, state, reg, own_stages > 0, 0)
    solution = _finish(problem, state, reg, tolerance, max_iterations)
    if bounded:
        solution.shift += base[:, 0].to(solution.shift)
    else:
        solution.f += half.to(solution.f)
        solution.g += half.to(solution.g)
    return solution


def annealing_stages(span: Tensor, reg: float, constraint: Constraint) -> Tensor:
    """Return by how many factors of `STAGE_FACTOR` eps starts higher, (B,); 0 if the kernel holds at `reg`."""
    limit = EXP_RANGE if isinstance(constraint, Bounded) else TRANSFORMED_RANGE
    stages = (span / (reg * EXP_RANGE / STAGE_FACTOR)).clamp_min(1).log() / math.log(STAGE_FACTOR)
    return torch.where(span > limit * reg, stages.ceil(), torch.zeros_like(stages))


def _stage(problem: _Problem, state: _State, eps: float, active: Tensor, iterations: int) -> None:
    """Iterate at one eps, starting in the log domain, which brings every row and column into range."""
    kernel = state.exponent(problem.cost, eps)
    for _ in range(1 if iterations else 2):
        _iterate(problem, kernel, state, eps, active, log_domain=True)
    state.absorb(eps)
    if iterations:
        kernel = state.exponent(problem.cost, eps).clamp_max_(REBUILD * 2).exp_()
        for _ in range(iterations):
            _iterate(problem, kernel, state, eps, active, log_domain=False)
        state.absorb(eps)


def _finish(problem: _Problem, state: _State, eps: float, tolerance: float, max_iterations: int) -> Solution:
    """Iterate at the final eps until each problem's error is below the tolerance."""
    kernel = state.exponent(problem.cost, eps).exp_()
    active = torch.ones_like(state.z, dtype=torch.bool)
    iterations = torch.zeros_like(active[:, 0], dtype=torch.long)
    error = torch.full_like(state.z[:, 0], math.inf)
    relaxation = torch.ones_like(state.z)
    done, go_on, last = 0, True, error
    if isinstance(problem.constraint, Balanced):
        scaled = scale(
            kernel,
            problem.a,
            problem.b,
            problem.alpha * state.x.exp(),
            problem.beta * state.y.exp(),
            tolerance,
            max_iterations,
        )
        state.x = torch.where(problem.a > 0, (scaled.q / problem.alpha).log(), 0.0)
        state.y = torch.where(problem.b > 0, (scaled.w / problem.beta).log(), 0.0)
        active, error, iterations, done = scaled.active[:, None], scaled.error, scaled.iterations, scaled.done
        go_on = bool(active.any())
    while go_on and done < max_iterations:
        for _ in range(BLOCK):
            _iterate(problem, kernel, state, eps, active, False, relaxation)
        done += BLOCK
        error = torch.where(active[:, 0], _residual(problem, kernel, state, eps), error)
        iterations = torch.where(active[:, 0], done, iterations)
        if isinstance(problem.constraint, Balanced) and done % RELAX_EVERY == 0:
            if done > SCALING_ITERATIONS + RELAX_EVERY:
                relaxation = relax(relaxation, (error / last)[:, None] ** (1 / RELAX_EVERY))
            last = error
        active = active & ~(error <= tolerance)[:, None]
        large = active & (torch.maximum(state.x.abs().amax(1), state.y.abs().amax(1)) > REBUILD)[:, None]
        go_on, rebuild = torch.stack([active.any(), large.any()]).tolist()
        if go_on and rebuild:
            state.absorb(eps, large)
            kernel = state.exponent(problem.cost, eps).exp_()
    plan = kernel.mul_((problem.alpha * (state.x + state.z).exp())[:, :, None])
    plan = plan.mul_((problem.beta * state.y.exp())[:, None, :])
    state.absorb(eps)
    f, g, shift = (offset.to(problem.cost) for offset in (state.f0, state.g0, state.l0[:, 0]))
    return Solution(plan, f, g, shift, error, iterations, not go_on)
