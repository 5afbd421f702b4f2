"""Plans on a CUDA device: one Triton kernel launch for a whole batch.

Each program solves one problem. An iteration is one pass over its costs, in tiles of columns that span all rows. The
kernel entries for the current potentials, k_ij = a_i exp((f_i + g_j - C_ij) / eps), give the column update g_j -=
eps log sum_i k_ij. The entries corrected by it form the plan, and their row sums r_i give both the error and the next
row update, f_i += eps (log a_i - log r_i). So costs are read once per iteration, the plan is written once, the host
never waits, and each problem stops by its own error.

The kernel handles fp32, product reference, and at most `MAX_ROWS` rows or columns. A problem that it cannot solve
(bad input, or costs that span too many eps to converge in `MAX_ITERATIONS` without annealing) has an error that is NaN
or above the tolerance. It then goes to solver.py, which anneals and reports what is wrong.
"""

import torch
from torch import Tensor

from pisces_rl.ot.constraints import Balanced, Constraint, Penalised

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

MAX_ROWS = 128
MAX_ITERATIONS = 100
TILE = 8192  # costs that a program processes at a time, sixteen per thread


def serves(cost: Tensor, tolerance: float) -> bool:
    """Return whether the kernel can try this batch."""
    return (
        triton is not None
        and cost.device.type == "cuda"
        and cost.dtype == torch.float32
        and min(cost.shape[1:]) <= MAX_ROWS
        and tolerance >= 5e-6
    )


def solve(
    cost: Tensor, a: Tensor, b: Tensor, reg: float, constraint: Constraint, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return plan (B, N, M), value, error, iterations (B,), and f (B, N), g (B, M) in units of cost."""
    batch, rows, columns = cost.shape
    plan = torch.empty(batch, rows, columns, device=cost.device, dtype=cost.dtype)
    f, g = cost.new_empty(batch, rows), cost.new_empty(batch, columns)
    value, error = cost.new_empty(2, batch)
    iterations = torch.empty(batch, device=cost.device, dtype=torch.long)
    ours, theirs = (a, f, 1), (b, g, 2)
    if rows > columns:  # the kernel's rows must be the shorter axis
        ours, theirs = theirs, ours
    (first, x, n_axis), (second, y, m_axis) = ours, theirs
    block_n = max(16, triton.next_power_of_2(x.shape[1]))
    block_m = min(TILE // block_n, max(16, triton.next_power_of_2(y.shape[1])))
    kind = 0 if isinstance(constraint, Balanced) else 1 if isinstance(constraint, Penalised) else 2
    rho = constraint.rho if kind == 1 else 1.0
    _sinkhorn[(batch,)](
        cost,
        first,
        second,
        constraint.mass if kind == 2 else value,
        plan,
        x,
        y,
        value,
        error,
        iterations,
        x.shape[1],
        y.shape[1],
        cost.stride(0),
        cost.stride(n_axis),
        cost.stride(m_axis),
        plan.stride(0),
        plan.stride(n_axis),
        plan.stride(m_axis),
        first.stride(0),
        first.stride(1),
        second.stride(0),
        second.stride(1),
        reg,
        1.0 / reg,
        rho / (rho + reg) if kind == 1 else 1.0,
        reg / rho,
        tolerance,
        min(max_iterations, MAX_ITERATIONS),
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        KIND=kind,
        num_warps=max(4, block_n * block_m // 512),
    )
    return plan, value, error, iterations, f, g


if triton is not None:

    @triton.jit
    def _tile(cost, i, start, n, m, cost_n, cost_m, valid_a, BLOCK_M: tl.constexpr):
        """Load the costs of a tile of columns; infinite in rows without weight and past the last column."""
        j = start + tl.arange(0, BLOCK_M)
        at = i[:, None] * cost_n + j[None, :] * cost_m
        return tl.load(cost + at, mask=valid_a[:, None] & (j < m)[None, :], other=float("inf"))

    @triton.jit
    def _sinkhorn(
        cost,
        a,
        b,
        masses,
        plan,
        f_out,
        g_out,
        value_out,
        error_out,
        iterations_out,
        n,
        m,
        cost_b,
        cost_n,
        cost_m,
        plan_b,
        plan_n,
        plan_m,
        a_b,
        a_n,
        b_b,
        b_m,
        reg,
        inverse_reg,
        damping,
        reg_over_rho,
        tolerance,
        max_iterations,
        BLOCK_N: tl.constexpr,
        BLOCK_M: tl.constexpr,
        KIND: tl.constexpr,
    ):
        """KIND 0: balanced. 1: penalised. 2: bounded, with a mass. f, g, shift in units of reg; see constraints.py."""
        problem = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK_N)
        cost += problem * cost_b
        plan += problem * plan_b
        b += problem * b_b
        g_out += problem * m
        weight_a = tl.load(a + problem * a_b + i * a_n, mask=i < n, other=0.0)
        valid_a = weight_a > 0
        log_a = tl.where(valid_a, tl.log(tl.where(valid_a, weight_a, 1.0)), float("-inf"))
        mass_a = tl.sum(weight_a, 0)
        bad = tl.sum(tl.where((weight_a >= 0) & (weight_a < float("inf")), 0.0, 1.0), 0)

        # first row update, f_i = -LSE_j(log b_j - C_ij / eps), with a running maximum per cell of the tile
        high = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        wrong = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        masses_b = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            c = _tile(cost, i, start, n, m, cost_n, cost_m, valid_a, BLOCK_M)
            weight_b = tl.load(b + j * b_m, mask=j < m, other=0.0)
            valid_b = weight_b > 0
            cells = valid_a[:, None] & valid_b[None, :]
            masses_b += tl.where((weight_b >= 0) & (weight_b < float("inf")), weight_b, float("nan"))
            wrong += tl.where(cells, tl.where(tl.abs(c) < float("inf"), 0.0, 1.0), 0.0)
            log_b = tl.where(valid_b, tl.log(tl.where(valid_b, weight_b, 1.0)), float("-inf"))
            tl.store(g_out + j, tl.zeros((BLOCK_M,), tl.float32), mask=j < m)
            e = tl.where(cells, log_b[None, :] - c * inverse_reg, float("-inf"))
            top = tl.maximum(high, e)
            safe = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp(high - safe) + tl.exp(e - safe)
            high = top
        mass_b = tl.sum(masses_b, 0)
        bad += tl.sum(tl.sum(wrong, 1), 0) + tl.where(mass_b == mass_b, 0.0, 1.0)
        top = tl.max(high, 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        sums = tl.sum(total * tl.exp(high - safe[:, None]), 1)
        empty = (mass_a == 0) | (mass_b == 0)
        rows = valid_a & (sums > 0)
        log_sums = tl.where(rows, safe + tl.log(tl.where(rows, sums, 1.0)), 0.0)
        balance = 0.0
        shift = 0.0
        mass = 0.0
        if KIND == 0:  # equalise masses that differ by rounding
            bad += tl.where(empty | (tl.abs(mass_a - mass_b) <= 1e-4 * tl.maximum(mass_a, mass_b)), 0.0, 1.0)
            balance = tl.log(tl.where(empty, 1.0, mass_a / mass_b))
        if KIND == 2:
            mass = tl.load(masses + problem)
            f = tl.zeros((BLOCK_N,), tl.float32)
            of_rows = tl.where(rows, log_sums + log_a, float("-inf"))
            peak = tl.where(empty, 0.0, tl.max(of_rows, 0))
            whole = peak + tl.log(tl.where(empty, 1.0, tl.sum(tl.exp(of_rows - peak), 0)))
            shift = tl.log(tl.where(empty, 1.0, mass)) - whole
        else:
            f = tl.where(rows, -damping * (balance + log_sums), 0.0)

        largest = tl.maximum(mass_a, mass_b)
        iteration = 0
        error = tl.where(bad > 0, float("nan"), tl.where(empty, 0.0, 1e30))
        moved = 0.0
        dual_b = 0.0
        t = 0.0  # still to be subtracted from g after being added to f
        while (iteration < max_iterations) & (error > tolerance):
            shares = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            duals = tl.zeros((BLOCK_M,), tl.float32)
            factor = f + log_a + shift
            ahead = _tile(cost, i, 0, n, m, cost_n, cost_m, valid_a, BLOCK_M)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                c = ahead
                ahead = _tile(cost, i, start + BLOCK_M, n, m, cost_n, cost_m, valid_a, BLOCK_M)  # prefetch
                weight_b = tl.load(b + j * b_m, mask=j < m, other=0.0)
                valid_b = weight_b > 0
                old = tl.load(g_out + j, mask=j < m, other=0.0) - t
                k = tl.exp(factor[:, None] + (old[None, :] - c * inverse_reg))
                g = damping * (old - tl.log(tl.maximum(tl.sum(k, 0), 1e-37)))
                if KIND == 2:
                    g = tl.minimum(g, 0.0)
                g = tl.where(valid_b, g, 0.0)
                tl.store(g_out + j, g, mask=j < m)
                scale = tl.where(valid_b, weight_b * tl.exp(g - old + balance), 0.0)
                shares += tl.where(valid_b[None, :], k * scale[None, :], 0.0)  # a cost with zero weight may be NaN
                if KIND == 1:
                    duals += weight_b * (1 - tl.exp(-g * reg_over_rho))
                else:
                    duals += weight_b * g
            sums = tl.sum(shares, 1)
            dual_b = tl.sum(duals, 0)
            moved = tl.sum(sums, 0)
            excess = sums - weight_a
            t = 0.0
            if KIND == 0:
                error = tl.sum(tl.abs(excess), 0) / largest
            if KIND == 1:
                error = tl.sum(tl.abs(sums - weight_a * tl.exp(-f * reg_over_rho)), 0) / largest
            if KIND == 2:
                error = tl.sum(tl.where(f < 0, tl.abs(excess), tl.maximum(excess, 0.0)), 0) + tl.abs(moved - mass)
                error = error / largest
            iteration += 1
            if (error > tolerance) & (iteration < max_iterations):
                step = tl.where(rows, log_a - tl.log(tl.maximum(sums, 1e-37)), 0.0)
                if KIND == 2:
                    new = tl.minimum(f + step, 0.0)
                    shift += tl.log(mass / tl.sum(sums * tl.exp(new - f), 0))
                    f = new
                else:
                    f = damping * (f + step)
                if KIND == 1:  # the optimal (f + t, g - t), see Penalised.translation
                    of_a = tl.sum(tl.where(rows, weight_a * tl.exp(-f * reg_over_rho), 0.0), 0)
                    t = tl.log(of_a / (mass_b - dual_b)) / (2 * reg_over_rho)
                    t = tl.where(tl.abs(t) < float("inf"), t, 0.0)
                    f = tl.where(rows, f + t, 0.0)

        factor = f + log_a + shift
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            c = _tile(cost, i, start, n, m, cost_n, cost_m, valid_a, BLOCK_M)
            weight_b = tl.load(b + j * b_m, mask=j < m, other=0.0)
            valid_b = weight_b > 0
            log_b = tl.log(tl.where(valid_b, weight_b, 1.0)) + balance
            g = tl.load(g_out + j, mask=(j < m) & valid_b, other=0.0)
            p = tl.exp(factor[:, None] + ((g + log_b)[None, :] - c * inverse_reg))
            p = tl.where(valid_a[:, None] & valid_b[None, :], p, 0.0)
            tl.debug_barrier()  # wait until every thread has read g
            tl.store(g_out + j, reg * g, mask=j < m)
            tl.store(plan + i[:, None] * plan_n + j[None, :] * plan_m, p, mask=(i < n)[:, None] & (j < m)[None, :])

        if KIND == 1:
            dual_a = tl.sum(tl.where(rows, weight_a * (1 - tl.exp(-f * reg_over_rho)), 0.0), 0)
            value = (dual_a + dual_b) / reg_over_rho
        else:
            value = tl.sum(tl.where(rows, weight_a * f, 0.0), 0) + dual_b + mass * shift
        tl.store(f_out + problem * n + i, tl.where(valid_a, reg * (f + shift), 0.0), mask=i < n)
        tl.store(error_out + problem, error)
        tl.store(iterations_out + problem, iteration)
        tl.store(value_out + problem, tl.where(empty, 0.0, reg * (value - (moved - mass_a * mass_b))))
