"""The kernels of `fp8.py`: rounding by rows, alone or in one pass with a norm or a GELU, and the products.

Each is an operator that a compiler does not split or, on a CUDA device, whose Triton kernels it launches itself
(`operator`); elsewhere it computes the same in plain torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import always, kernel, launch, modulated_norm, operator, serves, triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows of x (M, K) to e4m3; return them and their scales (M, 1), the least power of two that fits."""
    x = x.float()
    bits = (x.abs().amax(1, keepdim=True).clamp_min(1e-30) * (1 / LARGEST)).view(torch.int32)
    exponent = (bits + 0x7FFFFF) >> 23
    inverse = ((254 - exponent) << 23).view(torch.float32)
    return (x * inverse).to(E4M3), (exponent << 23).view(torch.float32)


def _outputs(rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows, width, dtype=E4M3), like.new_empty(rows, 1, dtype=torch.float32)


def _parts(width: int) -> dict[str, int]:
    """Return the sizes of a row's two blocks, both powers of two."""
    full = 1 << (width.bit_length() - 1)
    return dict(FULL=full, REST=1 << max(width - full - 1, 0).bit_length(), num_warps=min(max(full // 512, 1), 16))


@operator(inline=always)
def quantised(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round rows of x (M, K), times a factor (K,), to e4m3; return them and their scales (M, 1)."""
    if not serves(x):
        return rounded_rows(x if factor is None else x.float() * factor)
    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = _outputs(*x.shape, x)
    kernel(_quantised)[(len(x),)](x, factor, q, scale, x.shape[1], x.stride(0), **launch(x.shape[1]))
    return q, scale


@torch.library.register_fake("pisces_rl::quantised")
def _(x, factor):
    return _outputs(*x.shape, x)


@operator(inline=always)
def quantised_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    kept: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x' and n (B L, D) of `modulated_norm` in `dtype`, n empty unless `kept`; n in e4m3 and its scales."""
    batch, length, width = x.shape
    if not serves(x):
        total, n = modulated_norm(x, y, gate, scale, shift, eps, None, dtype)
        q, scales = rounded_rows(n)
        return total, n.contiguous() if kept else x.new_empty(0, dtype=dtype), q, scales
    rows = batch * length
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    n = x.new_empty(rows, width, dtype=dtype) if kept else x.new_empty(0, dtype=dtype)
    q, scales = _outputs(rows, width, x)
    kernel(_quantised_norm)[(rows,)](
        x,
        y,
        gate,
        scale,
        shift,
        total,
        n if kept else None,
        q,
        scales,
        length,
        width,
        scale.stride(0),
        shift.stride(0),
        0 if gate is None else gate.stride(0),
        eps,
        ROUNDED=dtype == torch.bfloat16,
        **launch(width),
    )
    return total, n, q, scales


@torch.library.register_fake("pisces_rl::quantised_norm")
def _(x, y, gate, scale, shift, eps, kept, dtype):
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    n = x.new_empty(rows, width, dtype=dtype) if kept else x.new_empty(0, dtype=dtype)
    return total, n, *_outputs(rows, width, x)


@operator(inline=always)
def quantised_gelu(z: Tensor, kept: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return h = GELU(z) (M, K), in its tanh approximation, empty unless `kept`, then h in e4m3 and its scales."""
    if not serves(z):
        h = F.gelu(z, approximate="tanh")
        return h if kept else z.new_empty(0), *rounded_rows(h)
    z = z.contiguous()
    h = torch.empty_like(z) if kept else z.new_empty(0)
    q, scale = _outputs(*z.shape, z)
    kernel(_quantised_gelu)[(len(z),)](z, h if kept else None, q, scale, z.shape[1], **_parts(z.shape[1]))
    return h, q, scale


@torch.library.register_fake("pisces_rl::quantised_gelu")
def _(z, kept):
    return torch.empty_like(z) if kept else z.new_empty(0), *_outputs(*z.shape, z)


@operator(inline=always)
def quantised_gelu_backward(grad: Tensor, z: Tensor, factor: Tensor, kept: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return g = grad GELU'(z), empty unless `kept`, then g times a factor (K,) in e4m3 and its scales."""
    if not serves(z):
        g = torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
        return g if kept else z.new_empty(0), *rounded_rows(g.float() * factor)
    grad, z = grad.contiguous(), z.contiguous()
    g = torch.empty_like(z) if kept else z.new_empty(0)
    q, scale = _outputs(*z.shape, z)
    kernel(_quantised_gelu_backward)[(len(z),)](
        grad, z, factor, g if kept else None, q, scale, z.shape[1], **_parts(z.shape[1])
    )
    return g, q, scale


@torch.library.register_fake("pisces_rl::quantised_gelu_backward")
def _(grad, z, factor, kept):
    return torch.empty_like(z) if kept else z.new_empty(0), *_outputs(*z.shape, z)


def scaled_product(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the product (M, N) of `fp8.py` from q (M, K) and a weight's bits (N, K), plus u b^T if given."""
    factors = q, weight.view(E4M3).T, scale, weight_scale.float()[None]
    if q.is_cuda and u is None and dtype == torch.bfloat16:  # not our operator, so that a compiler calls cuBLAS itself
        return torch._scaled_mm(*factors, bias, out_dtype=dtype, use_fast_accum=True)
    return product_with_lora(*factors, bias, u, None if b is None else b.T, dtype)


@operator
def product_with_lora(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return scale weight_scale q weight + bias + u b, (M, N), from q (M, K) and weight (K, N) in e4m3."""
    if not q.is_cuda:
        y = (q.float() @ weight.float() * scale * weight_scale + (0 if bias is None else bias)).to(dtype)
    elif dtype == torch.bfloat16:
        y = torch._scaled_mm(q, weight, scale, weight_scale, bias, out_dtype=dtype, use_fast_accum=True)
    else:  # row-scaled products only come in bf16
        y = torch._scaled_mm(q, weight, scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True).to(dtype)
        y = y if bias is None else y + bias
    return y if u is None else y.addmm_(u, b)


@torch.library.register_fake("pisces_rl::product_with_lora")
def _(q, weight, scale, weight_scale, bias, u, b, dtype):
    return q.new_empty(len(q), weight.shape[1], dtype=dtype)


@operator(inline=always)
def transposed(weight: Tensor) -> Tensor:
    """Transpose a weight's bits (N, K) to contiguous (K, N): FP8 products read both factors along the sum."""
    if not serves(weight):
        return weight.T.contiguous()
    out = weight.new_empty(weight.shape[1], weight.shape[0])
    grid = -(-len(weight) // 64), -(-weight.shape[1] // 64)
    kernel(_transpose)[grid](weight, out, *weight.shape, BLOCK=64)
    return out


@torch.library.register_fake("pisces_rl::transposed")
def _(weight):
    return weight.new_empty(weight.shape[1], weight.shape[0])


if triton is not None:
    from .kernels import normed_row, tl

    @triton.jit
    def _power(largest):
        """Return the least power-of-two scale at which e4m3 holds a number, and its inverse."""
        bits = (tl.maximum(largest, 1e-30) * (1 / 448.0)).to(tl.int32, bitcast=True)
        exponent = (bits + 0x7FFFFF) >> 23
        return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def _round_row(x, at, inside, q, scales, row):
        """Store a row in e4m3 and its scale."""
        scale, inverse = _power(tl.max(tl.abs(tl.where(inside, x, 0.0)), 0))
        tl.store(q + at, (x * inverse).to(q.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _round_parts(first, second, at, rest, inside, q, scales, row):
        """Apply `_round_row` to a row in two parts; the second is 0 where not `inside`."""
        scale, inverse = _power(tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0)))
        tl.store(q + at, (first * inverse).to(q.dtype.element_ty))
        tl.store(q + rest, (second * inverse).to(q.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _quantised(x, factor, q, scales, width, x_stride, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK)
        inside = d < width
        value = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
        if factor is not None:
            value *= tl.load(factor + d, mask=inside, other=0.0).to(tl.float32)
        _round_row(value, row * width + d, inside, q, scales, row)

    if triton.knobs.runtime.interpret or torch.version.hip:

        @triton.jit
        def _tanh(x):
            return 2 * tl.sigmoid(2 * x) - 1

    else:

        @triton.jit
        def _tanh(x):
            # One instruction, 2^-11 from tanh, where exp and a quotient would dominate the time. GELU is then
            # |z| 2^-12 off: less than e4m3 rounds numbers near 1, more than it rounds the small ones of the left tail.
            return tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )

    @triton.jit
    def _gelu(z):
        half = 0.5 * z
        return half + half * _tanh(z * (0.7978845608028654 + 0.035677408136300125 * z * z))

    @triton.jit
    def _gelu_slope(z):
        square = z * z
        t = _tanh(z * (0.7978845608028654 + 0.035677408136300125 * square))
        return 0.5 + 0.5 * t + 0.5 * z * (1 - t * t) * (0.7978845608028654 + 3 * 0.035677408136300125 * square)

    # A row is two blocks, the first of them full: 8,960 numbers are 8,192 and 768. One block would be 16,384 wide, and
    # exponentials, not memory, would dominate the time.

    @triton.jit
    def _quantised_gelu(z, h, q, scales, width, FULL: tl.constexpr, REST: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at, rest = row * width + tl.arange(0, FULL), row * width + FULL + tl.arange(0, REST)
        inside = FULL + tl.arange(0, REST) < width
        first = _gelu(tl.load(z + at).to(tl.float32)).to(z.dtype.element_ty)
        second = _gelu(tl.load(z + rest, mask=inside, other=0.0).to(tl.float32)).to(z.dtype.element_ty)
        if h is not None:
            tl.store(h + at, first)
            tl.store(h + rest, second, mask=inside)
        _round_parts(first.to(tl.float32), second.to(tl.float32), at, rest, inside, q, scales, row)

    @triton.jit
    def _quantised_gelu_backward(grad, z, factor, g, q, scales, width, FULL: tl.constexpr, REST: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        d, e = tl.arange(0, FULL), FULL + tl.arange(0, REST)
        at, rest, inside = row * width + d, row * width + e, e < width
        first = tl.load(grad + at).to(tl.float32) * _gelu_slope(tl.load(z + at).to(tl.float32))
        second = tl.load(grad + rest, mask=inside, other=0.0).to(tl.float32) * _gelu_slope(
            tl.load(z + rest, mask=inside, other=0.0).to(tl.float32)
        )
        first, second = first.to(z.dtype.element_ty), second.to(z.dtype.element_ty)
        if g is not None:
            tl.store(g + at, first)
            tl.store(g + rest, second, mask=inside)
        first = first.to(tl.float32) * tl.load(factor + d).to(tl.float32)
        second = second.to(tl.float32) * tl.load(factor + e, mask=inside, other=0.0).to(tl.float32)
        _round_parts(first, second, at, rest, inside, q, scales, row)

    @triton.jit
    def _quantised_norm(
        x,
        y,
        gate,
        scale,
        shift,
        total,
        n,
        q,
        scales,
        length,
        width,
        scale_stride,
        shift_stride,
        gate_stride,
        eps: tl.constexpr,
        ROUNDED: tl.constexpr,
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
        if ROUNDED:
            normed = normed.to(tl.bfloat16).to(tl.float32)
        if n is not None:
            tl.store(n + row * width + d, normed.to(n.dtype.element_ty), mask=inside)
        _round_row(normed, row * width + d, inside, q, scales, row)

    @triton.jit
    def _transpose(x, out, rows, columns, BLOCK: tl.constexpr):
        i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (i[:, None] < rows) & (j[None, :] < columns)
        tile = tl.load(x + i[:, None] * columns + j[None, :], mask=inside, other=0)
        tl.store(out + j[:, None] * rows + i[None, :], tl.trans(tile), mask=tl.trans(inside))
