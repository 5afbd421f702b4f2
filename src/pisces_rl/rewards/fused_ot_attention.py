"""Costs and fusion of ot_attention.py on a CUDA device, one Triton kernel launch each.

A program handles one head of one video: all its words at once, in tiles of video tokens. Sums and extremes are kept
per cell of the tile and reduced once per pass. The kernels compute the same as `BoundOTAttention.cost`, and as `.fuse`
with the softmax after it, which need about a hundred launches per layer.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

MAX_WORDS = 128
TILE = 8192  # cells that a program processes at a time, sixteen per thread


def serves(logits: Tensor) -> bool:
    """Return whether the kernels support this layer's logits (B, H, N, M)."""
    return (
        triton is not None
        and logits.device.type == "cuda"
        and logits.dtype == torch.float32
        and logits.shape[2] <= MAX_WORDS
    )


def _grid(shape: torch.Size) -> tuple[tuple[int], dict[str, int]]:
    batch, heads, n, m = shape
    block_n = max(16, triton.next_power_of_2(n))
    block_m = min(TILE // block_n, max(16, triton.next_power_of_2(m)))
    return (batch * heads,), dict(BLOCK_N=block_n, BLOCK_M=block_m, num_warps=max(4, block_n * block_m // 512))


def costs(
    query: Tensor,
    key: Tensor,
    logits: Tensor,
    scaling: float,
    words: Tensor,
    columns: Tensor,
    frame: Tensor,
    place: Tensor,
    temporal: float,
    spatial: float,
) -> Tensor:
    """Return costs (B, H, N, M), or (B, 1, N, M) without temporal and spatial terms, from queries (B, H, N, d), keys
    (B, H, M, d) and logits (B, H, N, M), for words (B, N) and columns (M,), with tokens at frames (M,) and places
    (M, 2).

    The inner product of queries and keys with all heads concatenated is the sum of the heads' logits / scaling.
    """
    products = logits.sum(1)
    lengths = (torch.linalg.vector_norm(z, dim=(1, 3), dtype=torch.float32) for z in (query, key))
    if not temporal and not spatial:
        logits = logits[:, :1]
    grid, options = _grid(logits.shape)
    out = torch.empty(logits.shape, device=logits.device)
    _costs[grid](
        products,
        *lengths,
        logits.contiguous(),
        words,
        columns,
        frame,
        place,
        out,
        *logits.shape[1:],
        1 / scaling,
        temporal,
        spatial,
        TIME=temporal > 0,
        SPACE=spatial > 0,
        **options,
    )
    return out


def fuse(kind: str, logits: Tensor, plan: Tensor, words: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fused attention's weights (B, H, N, M) from logits and plans (B, H or 1, N, M)."""
    grid, options = _grid(logits.shape)
    plan = plan.expand_as(logits)
    out = torch.empty(logits.shape, device=logits.device, dtype=dtype)
    _fuse[grid](
        logits.contiguous(),
        plan,
        *plan.stride(),
        words,
        columns,
        out,
        *logits.shape[1:],
        ARITHMETIC=kind == "arithmetic",
        GATED=kind == "gated",
        **options,
    )
    return out


if triton is not None:

    @triton.jit
    def _unit(x, low, high):
        """Scale x by its range; 0 if the range is empty or x is NaN."""
        scaled = (x - low) / tl.maximum(high - low, 1e-12)
        return tl.where(high > low, tl.where(scaled == scaled, scaled, 0.0), 0.0)

    @triton.jit
    def _least(x):
        return tl.min(tl.min(x, 1), 0)

    @triton.jit
    def _most(x):
        return tl.max(tl.max(x, 1), 0)

    @triton.jit
    def _distances(x, y, at_x, at_y):
        """Return distances from (N,) points to (M,) points in the plane."""
        along, across = x[:, None] - at_x[None, :], y[:, None] - at_y[None, :]
        return tl.sqrt(along * along + across * across)

    @triton.jit
    def _costs(
        products,
        of_words,
        of_tokens,
        logits,
        words,
        columns,
        frames,
        places,
        out,
        heads,
        n,
        m,
        inverse_scaling,
        temporal,
        spatial,
        BLOCK_N: tl.constexpr,
        BLOCK_M: tl.constexpr,
        TIME: tl.constexpr,
        SPACE: tl.constexpr,
    ):
        problem = tl.program_id(0).to(tl.int64)
        video = problem // heads
        i = tl.arange(0, BLOCK_N)
        row = i[:, None]
        word = tl.load(words + video * n + i, mask=i < n, other=0) != 0
        towards = inverse_scaling / tl.maximum(tl.load(of_words + video * n + i, mask=i < n, other=1.0), 1e-12)
        products += video * n * m
        of_tokens += video * m
        logits += problem * n * m
        out += problem * n * m

        # where each word attends to among the plan's tokens, by a softmax, and the range of the cosines
        low = tl.full((BLOCK_N, BLOCK_M), float("inf"), tl.float32)
        high = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
        top = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            placed = tl.load(columns + j, mask=j < m, other=0) != 0
            cells = word[:, None] & placed[None, :]
            length = tl.maximum(tl.load(of_tokens + j, mask=j < m, other=1.0), 1e-12)
            at = row * m + j[None, :]
            c = 1 - tl.load(products + at, mask=cells, other=0.0) * (towards[:, None] / length[None, :])
            low = tl.minimum(low, tl.where(cells, c, float("inf")))
            high = tl.maximum(high, tl.where(cells, c, float("-inf")))
            if TIME or SPACE:
                x = tl.load(logits + at, mask=(row < n) & placed[None, :], other=float("-inf"))
                top = tl.maximum(top, x)
        low_x = _least(low)
        high_x = _most(high)

        tau = tl.zeros((BLOCK_N,), tl.float32)
        pi_x = tl.zeros((BLOCK_N,), tl.float32)
        pi_y = tl.zeros((BLOCK_N,), tl.float32)
        low_t = float("inf")
        high_t = float("-inf")
        low_s = float("inf")
        high_s = float("-inf")
        if TIME or SPACE:
            most = tl.max(top, 1)
            most = tl.where(most == float("-inf"), 0.0, most)
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            in_time = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            along = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            across = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                placed = tl.load(columns + j, mask=j < m, other=0) != 0
                x = tl.load(logits + row * m + j[None, :], mask=(row < n) & placed[None, :], other=float("-inf"))
                e = tl.exp(x - most[:, None])
                total += e
                if TIME:
                    in_time += e * tl.load(frames + j, mask=j < m, other=0.0)[None, :]
                if SPACE:
                    along += e * tl.load(places + 2 * j, mask=j < m, other=0.0)[None, :]
                    across += e * tl.load(places + 2 * j + 1, mask=j < m, other=0.0)[None, :]
            whole = tl.where(i < n, tl.sum(total, 1), 1.0)
            tau = tl.sum(in_time, 1) / whole
            pi_x = tl.sum(along, 1) / whole
            pi_y = tl.sum(across, 1) / whole

            low = tl.full((BLOCK_N, BLOCK_M), float("inf"), tl.float32)
            high = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
            low_place = tl.full((BLOCK_N, BLOCK_M), float("inf"), tl.float32)
            high_place = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                cells = word[:, None] & (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
                if TIME:
                    d = tl.abs(tau[:, None] - tl.load(frames + j, mask=j < m, other=0.0)[None, :])
                    low = tl.minimum(low, tl.where(cells, d, float("inf")))
                    high = tl.maximum(high, tl.where(cells, d, float("-inf")))
                if SPACE:
                    at_x = tl.load(places + 2 * j, mask=j < m, other=0.0)
                    at_y = tl.load(places + 2 * j + 1, mask=j < m, other=0.0)
                    d = _distances(pi_x, pi_y, at_x, at_y)
                    low_place = tl.minimum(low_place, tl.where(cells, d, float("inf")))
                    high_place = tl.maximum(high_place, tl.where(cells, d, float("-inf")))
            if TIME:
                low_t = _least(low)
                high_t = _most(high)
            if SPACE:
                low_s = _least(low_place)
                high_s = _most(high_place)

        low_c = float("inf")
        high_c = float("-inf")
        for step in range(2):  # first find the range of the sum, then scale the sum by it
            low = tl.full((BLOCK_N, BLOCK_M), float("inf"), tl.float32)
            high = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                at = row * m + j[None, :]
                cells = word[:, None] & (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
                length = tl.maximum(tl.load(of_tokens + j, mask=j < m, other=1.0), 1e-12)
                c = 1 - tl.load(products + at, mask=cells, other=0.0) * (towards[:, None] / length[None, :])
                c = _unit(c, low_x, high_x)
                if TIME:
                    d = tl.abs(tau[:, None] - tl.load(frames + j, mask=j < m, other=0.0)[None, :])
                    c += temporal * _unit(d, low_t, high_t)
                if SPACE:
                    at_x = tl.load(places + 2 * j, mask=j < m, other=0.0)
                    at_y = tl.load(places + 2 * j + 1, mask=j < m, other=0.0)
                    c += spatial * _unit(_distances(pi_x, pi_y, at_x, at_y), low_s, high_s)
                if step == 0:
                    low = tl.minimum(low, tl.where(cells, c, float("inf")))
                    high = tl.maximum(high, tl.where(cells, c, float("-inf")))
                else:
                    c = tl.where(cells, _unit(c, low_c, high_c), 0.0)
                    tl.store(out + at, c, mask=(row < n) & (j < m)[None, :])
            if step == 0:
                low_c = _least(low)
                high_c = _most(high)

    @triton.jit
    def _fuse(
        logits,
        plan,
        plan_b,
        plan_h,
        plan_n,
        plan_m,
        words,
        columns,
        out,
        heads,
        n,
        m,
        BLOCK_N: tl.constexpr,
        BLOCK_M: tl.constexpr,
        ARITHMETIC: tl.constexpr,
        GATED: tl.constexpr,
    ):
        tiny = 1.1754943508222875e-38
        problem = tl.program_id(0).to(tl.int64)
        video = problem // heads
        i = tl.arange(0, BLOCK_N)
        row = i[:, None]
        word = tl.load(words + video * n + i, mask=i < n, other=0) != 0
        count = tl.sum(tl.where(word, 1.0, 0.0), 0)
        logits += problem * n * m
        plan += video * plan_b + (problem % heads) * plan_h
        out += problem * n * m

        # log sum exp over all tokens and over the plan's tokens; the mass that each word moves
        high = tl.full((BLOCK_N, BLOCK_M), -3e38, tl.float32)
        high_plan = tl.full((BLOCK_N, BLOCK_M), -3e38, tl.float32)
        shares = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            inside = (row < n) & (j < m)[None, :]
            placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :] & inside
            x = tl.load(logits + row * m + j[None, :], mask=inside, other=-3e38)
            shares += tl.load(plan + row * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
            high = tl.maximum(high, x)
            high_plan = tl.maximum(high_plan, tl.where(placed, x, -3e38))
        top = tl.max(high, 1)
        top_plan = tl.max(high_plan, 1)
        moved = tl.sum(shares, 1)
        totals = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        totals_plan = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            inside = (row < n) & (j < m)[None, :]
            placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :] & inside
            x = tl.load(logits + row * m + j[None, :], mask=inside, other=0.0)
            totals += tl.where(inside, tl.exp(x - top[:, None]), 0.0)
            totals_plan += tl.where(placed, tl.exp(tl.where(placed, x, 0.0) - top_plan[:, None]), 0.0)
        log_sum = top + tl.log(tl.maximum(tl.sum(totals, 1), tiny))
        before = top_plan + tl.log(tl.maximum(tl.sum(totals_plan, 1), tiny)) - log_sum

        share = tl.exp(before) * count
        after = before
        gate = tl.full((BLOCK_N,), 1.0, tl.float32)
        if not ARITHMETIC:
            high = tl.full((BLOCK_N, BLOCK_M), -3e38, tl.float32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                inside = (row < n) & (j < m)[None, :]
                placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :] & inside
                p = tl.load(plan + row * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
                x = tl.load(logits + row * m + j[None, :], mask=inside, other=0.0) - log_sum[:, None]
                x += tl.log(tl.maximum(p / tl.maximum(moved, tiny)[:, None], tiny))
                high = tl.maximum(high, tl.where(placed, x, -3e38))
            top = tl.max(high, 1)
            totals = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for start in range(0, m, BLOCK_M):
                j = start + tl.arange(0, BLOCK_M)
                inside = (row < n) & (j < m)[None, :]
                placed = (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :] & inside
                p = tl.load(plan + row * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
                x = tl.load(logits + row * m + j[None, :], mask=inside, other=0.0) - log_sum[:, None]
                x += tl.log(tl.maximum(p / tl.maximum(moved, tiny)[:, None], tiny))
                totals += tl.where(placed, tl.exp(tl.where(placed, x, 0.0) - top[:, None]), 0.0)
            after = top + tl.log(tl.maximum(tl.sum(totals, 1), tiny))
            if GATED:  # the share of its weight that a word moves
                gate = tl.where(word, tl.minimum(moved * count, 1.0), 1.0)

        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            inside = (row < n) & (j < m)[None, :]
            cells = word[:, None] & (tl.load(columns + j, mask=j < m, other=0) != 0)[None, :]
            p = tl.load(plan + row * plan_n + j[None, :] * plan_m, mask=inside, other=0.0)
            x = tl.load(logits + row * m + j[None, :], mask=inside, other=0.0) - log_sum[:, None]
            e = tl.exp(x)
            if ARITHMETIC:
                new = tl.where(cells, (e + share[:, None] * p) / 2, e)
            else:
                x += tl.log(tl.maximum(p / tl.maximum(moved, tiny)[:, None], tiny)) + (before - after)[:, None]
                new = tl.where(cells, tl.exp(x), e) * gate[:, None]
            tl.store(out + row * m + j[None, :], new, mask=inside)
