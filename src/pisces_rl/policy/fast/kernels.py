"""Fused norms of a denoising block: each is computed with its neighbouring operations in one pass over memory.

Two functions and their gradients, as operators that a compiler does not split. On a CUDA device each is a Triton
kernel with one program per token; elsewhere it computes the same in plain torch. Everything is computed in fp32 (fp64
for fp64).

    modulated_norm:   x' = x + gate * y,   n = (x' - mean) / sqrt(var + eps) * scale + shift
    rotated_heads:    q' = R(q / sqrt(mean(q^2) + eps) * w_q),   k' alike,   R a rotation of neighbouring pairs

x' is rounded before its norm and q before its rotation, as in diffusers' models.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include it
    triton = None

MAX_WIDTH = 16384


def operator(function: Callable | None = None, *, inline: Callable[..., bool] | None = None) -> Callable:
    """Register a function of tensors as an operator that compilers do not split.

    This is `torch.library.custom_op` without its check that results alias no inputs: under torch 2.11 the check takes
    .2 ms per call, and the GPU then waits for the host in an update.

    Args:
        function: the function; None returns a decorator.
        inline: whether, for given arguments on a CUDA device, a compiled block launches the Triton kernels of
            `function` itself, as for `torch.library.triton_op`. That avoids Python's dispatch and Triton's binding of
            arguments, which take longer.
    """
    if function is None:
        return functools.partial(operator, inline=inline)
    name = f"pisces_rl::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default", function)
    if inline is not None:
        rule = functools.partial(_inlined, function, inline)
        torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule)
    return getattr(torch.ops.pisces_rl, function.__name__).default


def _inlined(function: Callable, inline: Callable[..., bool], mode, op, types, args: tuple, kwargs: dict | None):
    if not (serves(args[0]) and inline(*args)):
        return mode.__torch_dispatch__(op, types, args, kwargs)
    token = _TRACING.set(True)
    try:
        with mode:
            return function(*args, **kwargs or {})
    finally:
        _TRACING.reset(token)


def always(*args) -> bool:
    return True


def kernel(jitted):
    """Return a Triton kernel, wrapped for tracing while a compiler traces its launch."""
    return torch.library.wrap_triton(jitted) if _TRACING.get() else jitted


_TRACING = ContextVar("_TRACING", default=False)


def serves(x: Tensor) -> bool:
    """Return whether the kernels support tokens x (..., width)."""
    return triton is not None and x.device.type == "cuda" and x.dtype != torch.float64 and x.shape[-1] <= MAX_WIDTH


def _wide(rows: int, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new tensor (rows, width) whose rows begin at multiples of 128 bytes."""
    # Zeros on a CPU: its bf16 products read past a row's end, where garbage would make results NaN.
    new = torch.empty if like.device.type == "cuda" else torch.zeros
    return new(rows, -(-width // 64) * 64, device=like.device, dtype=dtype)[:, :width]


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@operator
def modulated_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    a: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x' (B, L, D), empty without y, and [n, n a^T] (B L, D + R) in `dtype`.

    Args:
        x: (B, L, D), contiguous.
        y: (B, L, D), contiguous, or None.
        gate: (B, D), fp32; None means 1.
        scale: (B, D), fp32.
        shift: (B, D), fp32.
        eps: of the norm.
        a: (R, D) in `dtype`; None returns n alone.
        dtype: of the second result.
    """
    batch, length, width = x.shape
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    joined = _wide(batch * length, width + (0 if a is None else len(a)), x, dtype)
    n = joined[:, :width]
    if serves(x):
        _modulated_norm[(batch * length,)](
            x,
            y,
            gate,
            scale,
            shift,
            total,
            n,
            length,
            width,
            joined.stride(0),
            scale.stride(0),
            shift.stride(0),
            0 if gate is None else gate.stride(0),
            eps,
            **launch(width),
        )
    else:
        if y is not None:
            x = total.copy_(_precise(x) + (y if gate is None else y * gate[:, None]))
        norm = torch.nn.functional.layer_norm(_precise(x), (width,), eps=eps)
        n.copy_((norm * scale[:, None] + shift[:, None]).flatten(0, 1))
    if a is not None:
        torch.mm(n, a.T, out=joined[:, width:])
    return total, joined


@torch.library.register_fake("pisces_rl::modulated_norm")
def _(x, y, gate, scale, shift, eps, a, dtype):
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    return total, _wide(x.shape[0] * x.shape[1], x.shape[2] + (0 if a is None else len(a)), x, dtype)


@operator(inline=always)
def modulated_norm_backward(
    x: Tensor, grad_x: Tensor, grad_n: Tensor, gate: Tensor | None, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and, if there is a gate, of y, from those of x' (B, L, D) and n (B L, D)."""
    batch, length, width = x.shape
    out_x = torch.empty_like(x)
    out_y = x.new_empty(0) if gate is None else torch.empty_like(x)
    if serves(x):
        grad_x, grad_n = grad_x.contiguous(), grad_n.contiguous()
        kernel(_modulated_norm_backward)[(batch * length,)](
            x,
            grad_x,
            grad_n,
            gate,
            scale,
            out_x,
            out_y,
            length,
            width,
            scale.stride(0),
            0 if gate is None else gate.stride(0),
            eps,
            **launch(width),
        )
        return out_x, out_y
    centred = _precise(x) - _precise(x).mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, grad = centred * inverse, grad_n.view_as(x) * scale[:, None]
    grad = grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)
    out_x.copy_(grad_x + inverse * grad)
    if gate is not None:
        out_y.copy_(gate[:, None] * (grad_x + inverse * grad))
    return out_x, out_y


@torch.library.register_fake("pisces_rl::modulated_norm_backward")
def _(x, grad_x, grad_n, gate, scale, eps):
    return torch.empty_like(x), x.new_empty(0) if gate is None else torch.empty_like(x)


@operator(inline=always)
def rotated_heads(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return queries and keys (B, L, H, d), normed over all heads and rotated, in `dtype`.

    Args:
        qkv: (B, L, 3 H d).
        weight_q: (H d,).
        weight_k: (H d,).
        cos: (L, d), each angle's cosine twice.
        sin: (L, d), each angle's sine twice.
        eps: of the norms.
        dtype: of the results.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q = qkv.new_empty(batch, length, width // cos.shape[1], cos.shape[1], dtype=dtype)
    k = torch.empty_like(q)
    kept = torch.promote_types(qkv.dtype, weight_q.dtype)
    if serves(qkv) and _is_power_of_two(cos.shape[1]):
        grid, options = _launch_heads(q)
        kernel(_rotated_heads)[grid](
            qkv, weight_q, weight_k, cos, sin, q, k, length, q.shape[2], eps, ROUNDED=kept != torch.float32, **options
        )
        return q, k
    for out, x, weight in zip((q, k), qkv.split(width, -1), (weight_q, weight_k)):
        x = _precise(x)
        x = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(kept).view(q.shape)
        out.copy_(_rotated(_precise(x), cos, sin))
    return q, k


@torch.library.register_fake("pisces_rl::rotated_heads")
def _(qkv, weight_q, weight_k, cos, sin, eps, dtype):
    heads = qkv.shape[2] // 3 // cos.shape[1]
    shape = (*qkv.shape[:2], heads, cos.shape[1])
    return qkv.new_empty(shape, dtype=dtype), qkv.new_empty(shape, dtype=dtype)


@operator(inline=lambda *args: args[-1] is None)
def rotated_heads_backward(
    qkv: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    b: Tensor | None,
) -> Tensor:
    """Return [g, g b] (B L, 3 H d + R), with g the gradient of qkv, from those of queries, keys and values
    (B, L, H, d).

    Args:
        qkv: (B, L, 3 H d).
        grad_q: (B, L, H, d).
        grad_k: (B, L, H, d).
        grad_v: (B, L, H, d).
        weight_q: (H d,).
        weight_k: (H d,).
        cos: as in `rotated_heads`.
        sin: as in `rotated_heads`.
        eps: of the norms.
        b: (3 H d, R); None returns g alone.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    joined = _wide(batch * length, 3 * width + (0 if b is None else b.shape[1]), qkv, qkv.dtype)
    out = joined[:, : 3 * width]
    if serves(qkv) and _is_power_of_two(cos.shape[1]):
        grads = [g.contiguous() for g in (grad_q, grad_k, grad_v)]
        grid, options = _launch_heads(grads[0])
        kernel(_rotated_heads_backward)[grid](
            qkv, *grads, weight_q, weight_k, cos, sin, out, length, grad_q.shape[2], out.stride(0), eps, **options
        )
    else:
        parts = out.split(width, -1)
        for part, x, grad, weight in zip(parts, qkv.split(width, -1), (grad_q, grad_k), (weight_q, weight_k)):
            x, grad = _precise(x), _rotated(_precise(grad), cos, -sin).flatten(2) * weight
            inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            part.copy_((inverse * grad - x * inverse**3 * (grad * x).mean(-1, keepdim=True)).flatten(0, 1))
        parts[2].copy_(grad_v.flatten(2).flatten(0, 1))
    if b is not None:
        torch.mm(out, b, out=joined[:, 3 * width :])
    return joined


@torch.library.register_fake("pisces_rl::rotated_heads_backward")
def _(qkv, grad_q, grad_k, grad_v, weight_q, weight_k, cos, sin, eps, b):
    width = qkv.shape[2] + (0 if b is None else b.shape[1])
    return _wide(qkv.shape[0] * qkv.shape[1], width, qkv, qkv.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (B, L, H, d) by the angles of cos and sin (L, d)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, 0::2], sin[:, None, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(max(block // 512, 1), 16))


def _launch_heads(q: Tensor) -> tuple[tuple[int], dict[str, int]]:
    heads, size = q.shape[2:]
    block = triton.next_power_of_2(heads)
    warps = min(max(block * size // 512, 1), 16)
    return (q.shape[0] * q.shape[1],), dict(BLOCK_H=block, HEAD=size, num_warps=warps)


if triton is not None:
    # `eps` is a constexpr: a compiled block passes other floats to a kernel as fp64, and sums would also be fp64.

    @triton.jit
    def normed_row(
        x,
        y,
        gate,
        scale,
        shift,
        total,
        row,
        length,
        width,
        scale_stride,
        shift_stride,
        gate_stride,
        eps: tl.constexpr,
        d,
        inside,
    ):
        """Return a row of n; if there is a y, store the row of x'."""
        video = row // length
        factor = tl.load(scale + video * scale_stride + d, mask=inside, other=0.0)
        offset = tl.load(shift + video * shift_stride + d, mask=inside, other=0.0)
        if gate is not None:
            opening = tl.load(gate + video * gate_stride + d, mask=inside, other=0.0)
        value = tl.load(x + row * width + d, mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            added = tl.load(y + row * width + d, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                added *= opening
            rounded = (value + added).to(total.dtype.element_ty)
            tl.store(total + row * width + d, rounded, mask=inside)
            value = rounded.to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        return centred * inverse * factor + offset

    @triton.jit
    def _modulated_norm(
        x,
        y,
        gate,
        scale,
        shift,
        total,
        n,
        length,
        width,
        n_stride,
        scale_stride,
        shift_stride,
        gate_stride,
        eps: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK)
        inside = d < width
        normed = normed_row(
            x,
            y,
            gate,
            scale,
            shift,
            total,
            row,
            length,
            width,
            scale_stride,
            shift_stride,
            gate_stride,
            eps,
            d,
            inside,
        )
        tl.store(n + row * n_stride + d, normed.to(n.dtype.element_ty), mask=inside)

    @triton.jit
    def _modulated_norm_backward(
        x,
        grad_x,
        grad_n,
        gate,
        scale,
        out_x,
        out_y,
        length,
        width,
        scale_stride,
        gate_stride,
        eps: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        video = row // length
        d = tl.arange(0, BLOCK)
        inside = d < width
        factor = tl.load(scale + video * scale_stride + d, mask=inside, other=0.0)
        if gate is not None:
            opening = tl.load(gate + video * gate_stride + d, mask=inside, other=0.0)
        at = row * width + d
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_n + at, mask=inside, other=0.0).to(tl.float32) * factor
        passed = tl.load(grad_x + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        normed = centred * inverse
        grad = passed + inverse * (grad - tl.sum(grad, 0) / width - normed * (tl.sum(grad * normed, 0) / width))
        tl.store(out_x + at, grad.to(out_x.dtype.element_ty), mask=inside)
        if gate is not None:
            tl.store(out_y + at, (grad * opening).to(out_y.dtype.element_ty), mask=inside)

    @triton.jit
    def _inverse_length(x, width, eps: tl.constexpr):
        return tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / width + eps)

    @triton.jit
    def _pairs(x, BLOCK_H: tl.constexpr, HEAD: tl.constexpr):
        return tl.split(tl.reshape(x, (BLOCK_H, HEAD // 2, 2)))

    @triton.jit
    def _rotated_heads(
        qkv,
        weight_q,
        weight_k,
        cosines,
        sines,
        q,
        k,
        length,
        heads,
        eps: tl.constexpr,
        ROUNDED: tl.constexpr,
        BLOCK_H: tl.constexpr,
        HEAD: tl.constexpr,
    ):
        head = tl.arange(0, BLOCK_H)[:, None]
        at = head * HEAD + tl.arange(0, HEAD)[None, :]
        inside = (head < heads) & (at >= 0)
        pair = tl.arange(0, HEAD // 2)[None, :]
        width = heads * HEAD
        row = tl.program_id(0).to(tl.int64)
        token = row % length
        cos = tl.load(cosines + token * HEAD + 2 * pair).to(tl.float32)
        sin = tl.load(sines + token * HEAD + 2 * pair + 1).to(tl.float32)
        start = row * width
        for which in tl.static_range(2):
            weight = tl.load((weight_q if which == 0 else weight_k) + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(qkv + 3 * start + which * width + at, mask=inside, other=0.0).to(tl.float32)
            x = x * _inverse_length(x, width, eps) * weight
            if ROUNDED:
                x = x.to(qkv.dtype.element_ty).to(tl.float32)
            even, odd = _pairs(x, BLOCK_H, HEAD)
            x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_H, HEAD))
            tl.store((q if which == 0 else k) + start + at, x.to(q.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotated_heads_backward(
        qkv,
        grad_q,
        grad_k,
        grad_v,
        weight_q,
        weight_k,
        cosines,
        sines,
        out,
        length,
        heads,
        out_stride,
        eps: tl.constexpr,
        BLOCK_H: tl.constexpr,
        HEAD: tl.constexpr,
    ):
        head = tl.arange(0, BLOCK_H)[:, None]
        at = head * HEAD + tl.arange(0, HEAD)[None, :]
        inside = (head < heads) & (at >= 0)
        pair = tl.arange(0, HEAD // 2)[None, :]
        width = heads * HEAD
        row = tl.program_id(0).to(tl.int64)
        token = row % length
        cos = tl.load(cosines + token * HEAD + 2 * pair).to(tl.float32)
        sin = tl.load(sines + token * HEAD + 2 * pair + 1).to(tl.float32)
        start = row * width
        for which in tl.static_range(2):
            weight = tl.load((weight_q if which == 0 else weight_k) + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(qkv + 3 * start + which * width + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load((grad_q if which == 0 else grad_k) + start + at, mask=inside, other=0.0).to(tl.float32)
            even, odd = _pairs(grad, BLOCK_H, HEAD)
            grad = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (BLOCK_H, HEAD))
            grad *= weight
            inverse = _inverse_length(x, width, eps)
            normed = x * inverse
            grad = inverse * (grad - normed * (tl.sum(tl.sum(grad * normed, 1), 0) / width))
            tl.store(out + row * out_stride + which * width + at, grad.to(out.dtype.element_ty), mask=inside)
        values = tl.load(grad_v + start + at, mask=inside, other=0.0)
        tl.store(out + row * out_stride + 2 * width + at, values.to(out.dtype.element_ty), mask=inside)
