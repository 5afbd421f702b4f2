"""The costs and the fusion of ot_attention.py on a CUDA device, a kernel launch each, in Triton.

A program does one head of one video: all its words at once, tile by tile of video tokens. What it computes is what
`BoundOTAttention.cost` and `.fuse` compute without it, in some hundred launches a layer.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

MAX_WORDS = 128


def serves(logits: Tensor) -> bool:
    """Whether the kernels take this layer's logits (B, H, N, M)."""
    return (
        triton is not None
        and logits.device.type == "cuda"
        and logits.dtype == torch.float32
        and logits.shape[2] <= MAX_WORDS
    )


def _grid(shape: torch.Size) -> tuple[tuple[int], dict[str, int]]:
    batch, heads, n, _ = shape
    block = max(16, triton.next_power_of_2(n))
    return (batch * heads,), dict(BLOCK_N=block, BLOCK_M=4096 // block, num_warps=8)


def costs(
    cosine: Tensor, logits: Tensor, words: Tensor, columns: Tensor, frame: Tensor, place: Tensor, temporal: float,
    spatial: float,
) -> Tensor:  # fmt: skip
    """(B, H, N, M) from cosine costs (B, N, M) and logits (B, H, N, M), over words (B, N) and columns (M,), for tokens
    of frames (M,) and places (M, 2)."""
    grid, options = _grid(logits.shape)
    out = torch.empty(logits.shape, device=logits.device)
    _costs[grid](
        cosine.contiguous(), logits.contiguous(), words, columns, frame.contiguous(), place.contiguous(), out,
        *logits.shape[1:], temporal, spatial, TIME=temporal > 0, SPACE=spatial > 0, **options,
    )  # fmt: skip
    return out


def fusion(kind: str, logits: Tensor, plan: Tensor, words: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bias (B, H, N, M) and the gate (B, H, N) of plans (B, H or 1, N, M)."""
    grid, options = _grid(logits.shape)
    plan = plan.expand_as(logits)
    bias, gate = torch.empty(logits.shape, device=logits.device), torch.empty(logits.shape[:3], device=logits.device)
    _fusion[grid](
        logits.contiguous(), plan, *plan.stride(), words, columns, bias, gate, *logits.shape[1:],
        ARITHMETIC=kind == "arithmetic", **options,
    )  # fmt: skip
    return bias, gate if kind != "log" else None


if triton is not None:

    @triton.jit
    def _unit(x, low, high):
        """x by its range, 0 if that is nothing, or x no number."""
        scaled = (x - low) / tl.maximum(high - low, 1e-12)
        return tl.where(high > low, tl.where(scaled == scaled, scaled, 0.0), 0.0)

    @triton.jit
    def _costs(
        cosine, logits, words, columns, frames, places, out, heads, n, m, temporal, spatial,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, TIME: tl.constexpr, SPACE: tl.constexpr,
    ):  # fmt: skip
        problem = tl.program_id(0).to(tl.int64)
        video = problem // heads
        i = tl.arange(0, BLOCK_N)
        word = tl.load(words + video * n + i, mask=i < n, other=0) != 0
        cosine += video * n * m
        logits += problem * n * m
        out += problem * n * m

        # where each word looks in the plan's tokens, by a running softmax, and the range of the cosines
        top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        tau = tl.zeros((BLOCK_N,), tl.float32)
        pi_y = tl.zeros((BLOCK_N,), tl.float32)
        pi_x = tl.zeros((BLOCK_N,), tl.float32)
        low = float("inf")
        high = float("-inf")
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            at = i[:, None] * m + j[None, :]
            placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
            cells = word[:, None] & placed
            c = tl.load(cosine + at, mask=cells, other=0.0)
            low = tl.minimum(low, tl.min(tl.min(tl.where(cells, c, float("inf")), 1), 0))
            high = tl.maximum(high, tl.max(tl.max(tl.where(cells, c, float("-inf")), 1), 0))
            if TIME or SPACE:
                x = tl.load(logits + at, mask=(i < n)[:, None] & placed, other=float("-inf"))
                new = tl.maximum(top, tl.max(x, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                shrink = tl.exp(top - safe)
                e = tl.exp(x - safe[:, None])
                total = total * shrink + tl.sum(e, 1)
                t = tl.load(frames + j, mask=j < m, other=0.0)
                tau = tau * shrink + tl.sum(e * t[None, :], 1)
                y = tl.load(places + 2 * j, mask=j < m, other=0.0)
                pi_y = pi_y * shrink + tl.sum(e * y[None, :], 1)
                x = tl.load(places + 2 * j + 1, mask=j < m, other=0.0)
                pi_x = pi_x * shrink + tl.sum(e * x[None, :], 1)
                top = new
        total = tl.where(i < n, total, 1.0)
        tau, pi_y, pi_x = tau / total, pi_y / total, pi_x / total

        low_t = float("inf")
        high_t = float("-inf")
        low_s = float("inf")
        high_s = float("-inf")
        if TIME or SPACE:
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                cells = word[:, None] & (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
                if TIME:
                    d = tl.abs(tau[:, None] - tl.load(frames + j, mask=j < m, other=0.0)[None, :])
                    low_t = tl.minimum(low_t, tl.min(tl.min(tl.where(cells, d, float("inf")), 1), 0))
                    high_t = tl.maximum(high_t, tl.max(tl.max(tl.where(cells, d, float("-inf")), 1), 0))
                if SPACE:
                    y = pi_y[:, None] - tl.load(places + 2 * j, mask=j < m, other=0.0)[None, :]
                    x = pi_x[:, None] - tl.load(places + 2 * j + 1, mask=j < m, other=0.0)[None, :]
                    d = tl.sqrt(y * y + x * x)
                    low_s = tl.minimum(low_s, tl.min(tl.min(tl.where(cells, d, float("inf")), 1), 0))
                    high_s = tl.maximum(high_s, tl.max(tl.max(tl.where(cells, d, float("-inf")), 1), 0))

        low_c = float("inf")
        high_c = float("-inf")
        for step in range(2):  # the range of the sum, then the sum by its range
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                inside = (i < n)[:, None] & (j < m)[None, :]
                at = i[:, None] * m + j[None, :]
                cells = word[:, None] & (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
                c = _unit(tl.load(cosine + at, mask=cells, other=0.0), low, high)
                if TIME:
                    d = tl.abs(tau[:, None] - tl.load(frames + j, mask=j < m, other=0.0)[None, :])
                    c += temporal * _unit(d, low_t, high_t)
                if SPACE:
                    y = pi_y[:, None] - tl.load(places + 2 * j, mask=j < m, other=0.0)[None, :]
                    x = pi_x[:, None] - tl.load(places + 2 * j + 1, mask=j < m, other=0.0)[None, :]
                    c += spatial * _unit(tl.sqrt(y * y + x * x), low_s, high_s)
                if step == 0:
                    low_c = tl.minimum(low_c, tl.min(tl.min(tl.where(cells, c, float("inf")), 1), 0))
                    high_c = tl.maximum(high_c, tl.max(tl.max(tl.where(cells, c, float("-inf")), 1), 0))
                else:
                    tl.store(out + at, tl.where(cells, _unit(c, low_c, high_c), 0.0), mask=inside)

    @triton.jit
    def _fusion(
        logits, plan, plan_b, plan_h, plan_n, plan_m, words, columns, bias, gate, heads, n, m,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ARITHMETIC: tl.constexpr,
    ):  # fmt: skip
        tiny = 1.1754943508222875e-38
        problem = tl.program_id(0).to(tl.int64)
        video = problem // heads
        i = tl.arange(0, BLOCK_N)
        word = tl.load(words + video * n + i, mask=i < n, other=0) != 0
        count = tl.sum(tl.where(word, 1.0, 0.0), 0)
        logits += problem * n * m
        plan += video * plan_b + (problem % heads) * plan_h
        bias += problem * n * m

        # log sum exp over all tokens, and over the plan's; what each word moves, and where all its tokens are
        top = tl.full((BLOCK_N,), -3e38, tl.float32)
        top_plan = tl.full((BLOCK_N,), -3e38, tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        total_plan = tl.zeros((BLOCK_N,), tl.float32)
        moved = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            inside = (i < n)[:, None] & (j < m)[None, :]
            placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :] & inside
            x = tl.load(logits + i[:, None] * m + j[None, :], mask=inside, other=-3e38)
            moved += tl.sum(tl.load(plan + i[:, None] * plan_n + j[None, :] * plan_m, mask=inside, other=0.0), 1)
            new = tl.maximum(top, tl.max(x, 1))
            total = total * tl.exp(top - new) + tl.sum(tl.where(inside, tl.exp(x - new[:, None]), 0.0), 1)
            top = new
            new = tl.maximum(top_plan, tl.max(tl.where(placed, x, -3e38), 1))
            part = tl.where(placed, tl.exp(tl.where(placed, x, 0.0) - new[:, None]), 0.0)
            total_plan = total_plan * tl.exp(top_plan - new) + tl.sum(part, 1)
            top_plan = new
        log_sum = top + tl.log(tl.maximum(total, tiny))
        before = top_plan + tl.log(tl.maximum(total_plan, tiny)) - log_sum

        if ARITHMETIC:
            share = tl.exp(before) * count
            total = (2.0 - tl.exp(before) + share * moved) / 2
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                inside = (i < n)[:, None] & (j < m)[None, :]
                placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
                p = tl.load(plan + i[:, None] * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
                x = tl.load(logits + i[:, None] * m + j[None, :], mask=inside, other=0.0) - log_sum[:, None]
                e = tl.exp(x)
                mixed = (e + tl.where(placed, share[:, None] * p, e)) / 2 / total[:, None]
                new = tl.where(word[:, None], tl.log(tl.maximum(mixed, tiny)) - x, 0.0)
                tl.store(bias + i[:, None] * m + j[None, :], new, mask=inside)
            tl.store(gate + problem * n + i, tl.where(word, total, 1.0), mask=i < n)
        else:
            top = tl.full((BLOCK_N,), -3e38, tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                inside = (i < n)[:, None] & (j < m)[None, :]
                placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :] & inside
                p = tl.load(plan + i[:, None] * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
                x = tl.load(logits + i[:, None] * m + j[None, :], mask=inside, other=0.0) - log_sum[:, None]
                x += tl.log(tl.maximum(p / tl.maximum(moved, tiny)[:, None], tiny))
                new = tl.maximum(top, tl.max(tl.where(placed, x, -3e38), 1))
                part = tl.where(placed, tl.exp(tl.where(placed, x, 0.0) - new[:, None]), 0.0)
                total = total * tl.exp(top - new) + tl.sum(part, 1)
                top = new
            after = top + tl.log(tl.maximum(total, tiny))
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                inside = (i < n)[:, None] & (j < m)[None, :]
                cells = word[:, None] & (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
                p = tl.load(plan + i[:, None] * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
                x = tl.log(tl.maximum(p / tl.maximum(moved, tiny)[:, None], tiny)) + (before - after)[:, None]
                tl.store(bias + i[:, None] * m + j[None, :], tl.where(cells, x, 0.0), mask=inside)
            tl.store(gate + problem * n + i, tl.where(word, tl.minimum(moved * count, 1.0), 1.0), mask=i < n)
