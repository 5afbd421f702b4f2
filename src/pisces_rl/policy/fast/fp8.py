"""Optional speed: products of a frozen base in FP8, the same in sampling, update and backward.

A frozen weight W (N, K) is rounded once to e4m3, four bits of precision, with a power of two t_n for each row. The
rows of an input are rounded alike, by the kernel that writes them where there is one (`modulated_norm`'s, a GELU's):

    y_mn = s_m t_n sum_k x8_mk w8_nk + b_n + (u B^T)_mn,    u = x A^T,

summed as cuBLAS does with fast accumulation, on a CPU in fp32; LoRA's part stays in the input's dtype, and its A and B
get their gradients from x itself. Backward's product with the base is in FP8, too: the gradient, times t along the
sum, is rounded by rows as x is,

    dL/dx_mk = r_m sum_n g8_mn w8_nk + (g B A)_mk,    r_m g8_mn ~ g_mn t_n.

So the base takes one byte a weight, and no other graph samples than the one that is trained. Scales are powers of two:
e4m3 has an exponent of its own, so another scale gains no precision, and what they multiply is exact. On a device
without FP8 the products are computed in fp32 from the same rounded values (CPU) or refused (`check_device`).
Format and scaling: Micikevicius et al., arXiv 2209.05433.
"""

import functools
import types
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import always, kernel, launch, modulated_norm, modulated_norm_backward, operator, serves, triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of the widths that FP8 products take
CAPABILITY = (8, 9)  # the first of NVIDIA's with them


class FP8Linear(nn.Linear):
    """A frozen linear layer whose weight is stored in e4m3: bits (out, in) in `weight`, scales in `weight_scale`.

    Bits are held as uint8, which no cast of a module and no library that looks for a dtype to compute in touches.
    Scales stay fp32. On CUDA the product comes in bf16, whatever the dtype of x, and is cast.
    """

    def _apply(self, function, recurse: bool = True):
        scale = self.weight_scale
        super()._apply(function, recurse)
        self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _SAVING.get():
            destination[f"{prefix}weight"] = dequantised(self).bfloat16()
            del destination[f"{prefix}weight_scale"]

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            y = FP8Product.apply(x.flatten(0, -2).to(dtype), self.weight, self.weight_scale, bias, None, None)
        return y.unflatten(0, x.shape[:-1])


def check_device(device: torch.device) -> None:
    """A ValueError where a device computes no FP8 products."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda" or torch.version.cuda is None:
        raise ValueError(f"base_precision='fp8' needs an NVIDIA GPU (or a CPU, for a trial), not {device}. Unset it.")
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        raise ValueError(
            f"base_precision='fp8' needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} (Ada, Hopper or "
            f"later); {torch.cuda.get_device_name(device)} has {'.'.join(map(str, have))}. Unset it."
        )


_SAVING = ContextVar("_SAVING", default=False)  # weights are saved as numbers


def save_numbers(denoiser: nn.Module) -> None:
    """Let `denoiser.save_pretrained` write the numbers of FP8 weights, in bf16, which holds them; bits would be loaded
    as numbers."""
    save = type(denoiser).save_pretrained

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        token = _SAVING.set(True)
        try:
            return save(self, *args, **kwargs)
        finally:
            _SAVING.reset(token)

    denoiser.save_pretrained = types.MethodType(save_pretrained, denoiser)


@torch.no_grad()
def quantise(layer: nn.Linear) -> None:
    """Make a frozen linear layer an `FP8Linear`."""
    bits, scale = _rounded(layer.weight.data)
    layer.__class__ = FP8Linear
    layer.weight = nn.Parameter(bits.view(torch.uint8), requires_grad=False)
    layer.register_buffer("weight_scale", scale.flatten())


def serves_fp8(layer: nn.Module) -> bool:
    """Whether `quantise` takes a layer."""
    return (type(layer) is nn.Linear and not layer.weight.requires_grad
            and not layer.in_features % MULTIPLE and not layer.out_features % MULTIPLE)  # fmt: skip


def dequantised(layer: FP8Linear) -> Tensor:
    """The weight that a layer multiplies with, in fp32; bf16 holds it exactly."""
    return layer.weight.view(E4M3).float() * layer.weight_scale.float()[:, None]


# --- operators ---


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (M, K) in e4m3, and their scales (M, 1): the least power of two by which a row fits."""
    x = x.float()
    bits = (x.abs().amax(1, keepdim=True).clamp_min(1e-30) * (1 / LARGEST)).view(torch.int32)
    exponent = (bits + 0x7FFFFF) >> 23
    inverse = ((254 - exponent) << 23).view(torch.float32)
    return (x * inverse).to(E4M3), (exponent << 23).view(torch.float32)


def _outputs(rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows, width, dtype=E4M3), like.new_empty(rows, 1, dtype=torch.float32)


def _parts(width: int) -> dict[str, int]:
    """The two blocks of a row, each of a power of two."""
    full = 1 << (width.bit_length() - 1)
    return dict(FULL=full, REST=1 << max(width - full - 1, 0).bit_length(), num_warps=min(max(full // 512, 1), 16))


@operator(inline=always)
def quantised(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of x (M, K), times a factor (K,), in e4m3, and their scales (M, 1)."""
    if not serves(x):
        return _rounded(x if factor is None else x.float() * factor)
    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = _outputs(*x.shape, x)
    kernel(_quantised)[(len(x),)](x, factor, q, scale, x.shape[1], x.stride(0), **launch(x.shape[1]))
    return q, scale


@torch.library.register_fake("pisces_rl::quantised")
def _(x, factor):
    return _outputs(*x.shape, x)


@operator(inline=always)
def quantised_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, kept: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x' and n (B L, D) of `modulated_norm` in `dtype`, n empty unless `kept`; n in e4m3, and its scales."""
    batch, length, width = x.shape
    if not serves(x):
        total, n = modulated_norm(x, y, gate, scale, shift, eps, None, dtype)
        q, scales = _rounded(n)
        return total, n.contiguous() if kept else x.new_empty(0, dtype=dtype), q, scales
    rows = batch * length
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    n = x.new_empty(rows, width, dtype=dtype) if kept else x.new_empty(0, dtype=dtype)
    q, scales = _outputs(rows, width, x)
    kernel(_quantised_norm)[(rows,)](
        x, y, gate, scale, shift, total, n if kept else None, q, scales, length, width, scale.stride(0),
        shift.stride(0), 0 if gate is None else gate.stride(0), eps, ROUNDED=dtype == torch.bfloat16, **launch(width),
    )  # fmt: skip
    return total, n, q, scales


@torch.library.register_fake("pisces_rl::quantised_norm")
def _(x, y, gate, scale, shift, eps, kept, dtype):
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    n = x.new_empty(rows, width, dtype=dtype) if kept else x.new_empty(0, dtype=dtype)
    return total, n, *_outputs(rows, width, x)


@operator(inline=always)
def quantised_gelu(z: Tensor, kept: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h = GELU(z), by its tanh approximation, (M, K), empty unless `kept`; h in e4m3, and its scales."""
    if not serves(z):
        h = F.gelu(z, approximate="tanh")
        return h if kept else z.new_empty(0), *_rounded(h)
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
    """g = grad GELU'(z), empty unless `kept`; g times a factor (K,) in e4m3, and its scales."""
    if not serves(z):
        g = torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
        return g if kept else z.new_empty(0), *_rounded(g.float() * factor)
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
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, u: Tensor | None,
    b: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(M, N) = the product above of q (M, K) and the bits of a weight (N, K), with u b^T where there is one."""
    factors = q, weight.view(E4M3).T, scale, weight_scale.float()[None]
    if q.is_cuda and u is None and dtype == torch.bfloat16:  # no operator of ours: a compiler calls cuBLAS itself
        return torch._scaled_mm(*factors, bias, out_dtype=dtype, use_fast_accum=True)
    return product_with_lora(*factors, bias, u, None if b is None else b.T, dtype)


@operator
def product_with_lora(
    q: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, u: Tensor | None,
    b: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(M, N) = scale weight_scale q weight + bias + u b of q (M, K) and weight (K, N) in e4m3."""
    if not q.is_cuda:
        y = (q.float() @ weight.float() * scale * weight_scale + (0 if bias is None else bias)).to(dtype)
    elif dtype == torch.bfloat16:
        y = torch._scaled_mm(q, weight, scale, weight_scale, bias, out_dtype=dtype, use_fast_accum=True)
    else:  # products that are scaled by rows come in bf16
        y = torch._scaled_mm(q, weight, scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True).to(dtype)
        y = y if bias is None else y + bias
    return y if u is None else y.addmm_(u, b)


@torch.library.register_fake("pisces_rl::product_with_lora")
def _(q, weight, scale, weight_scale, bias, u, b, dtype):
    return q.new_empty(len(q), weight.shape[1], dtype=dtype)


@operator(inline=always)
def transposed(weight: Tensor) -> Tensor:
    """A weight's bits (N, K) as (K, N), contiguous: FP8 products take both factors along the sum."""
    if not serves(weight):
        return weight.T.contiguous()
    out = weight.new_empty(weight.shape[1], weight.shape[0])
    grid = -(-len(weight) // 64), -(-weight.shape[1] // 64)
    kernel(_transpose)[grid](weight, out, *weight.shape, BLOCK=64)
    return out


@torch.library.register_fake("pisces_rl::transposed")
def _(weight):
    return weight.new_empty(weight.shape[1], weight.shape[0])


# --- what a block computes ---


def _backward(
    grad: Tensor, rounded: tuple[Tensor, Tensor], x: Tensor | None, u: Tensor | None, weight: Tensor,
    a: Tensor | None, b: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x, A and B from that of y, and from it times the weight's scales in e4m3."""
    grad_u = None if a is None else grad @ b
    ones = torch.ones(weight.shape[1], device=weight.device)  # the scales are in the gradient
    grad_x = scaled_product(*rounded, transposed(weight), ones, None, grad_u, None if a is None else a.T, dtype)
    return (grad_x, None, None) if a is None else (grad_x, grad_u.T @ x, grad.T @ u)


class FP8Product(torch.autograd.Function):
    """y (M, N) of x (M, K), a weight's bits and scales, a bias, A (R, K) and B (N, R)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, weight_scale: Tensor, bias, a: Tensor | None, b: Tensor | None):
        u = None if a is None else x @ a.T
        ctx.save_for_backward(None if a is None else x, u, weight, weight_scale, a, b)
        return scaled_product(*quantised(x, None), weight, weight_scale, bias, u, b, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, u, weight, weight_scale, a, b = ctx.saved_tensors
        rounded = quantised(grad, weight_scale)
        grad_x, grad_a, grad_b = _backward(grad, rounded, x, u, weight, a, b, grad.dtype)
        return grad_x, None, None, None, grad_a, grad_b


class FP8NormProduct(torch.autograd.Function):
    """x' = x + gate * y and the `FP8Product` of its modulated norm, as `linear.NormProduct` takes them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float,
        dtype: torch.dtype, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, a: Tensor | None,
        b: Tensor | None,
    ):  # fmt: skip
        total, n, *rounded = quantised_norm(x, y, gate, scale, shift, eps, a is not None, dtype)
        total, u = x if y is None else total, None if a is None else n @ a.T
        ctx.save_for_backward(total, gate, scale, n, u, weight, weight_scale, a, b)
        ctx.eps, ctx.y_dtype = eps, None if y is None else y.dtype
        return total, scaled_product(*rounded, weight, weight_scale, bias, u, b, dtype)

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        total, gate, scale, n, u, weight, weight_scale, a, b = ctx.saved_tensors
        rounded = quantised(grad, weight_scale)
        grad_n, grad_a, grad_b = _backward(grad, rounded, n, u, weight, a, b, grad.dtype)
        grads = _norm_backward(ctx, total, grad_total, grad_n, gate, scale)
        return *grads, *[None] * 8, grad_a, grad_b


class FP8FeedForward(torch.autograd.Function):
    """x' = x + gate * y and the feed-forward GELU(n W^T + b) V^T + c of its modulated norm n, with LoRAs or none.

    The GELU's output is rounded by the kernel that computes it, and so is its gradient.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float,
        dtype: torch.dtype,
        weight: Tensor, weight_scale: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        down: Tensor, down_scale: Tensor, down_bias: Tensor | None, down_a: Tensor | None, down_b: Tensor | None,
    ):  # fmt: skip
        total, n, *rounded = quantised_norm(x, y, gate, scale, shift, eps, a is not None, dtype)
        total, u = x if y is None else total, None if a is None else n @ a.T
        z = scaled_product(*rounded, weight, weight_scale, bias, u, b, dtype)
        h, *rounded_h = quantised_gelu(z, down_a is not None)
        down_u = None if down_a is None else h @ down_a.T
        ctx.save_for_backward(total, gate, scale, n, u, *rounded, weight, weight_scale, bias, a, b, down, down_scale,
                              down_a, down_b)  # fmt: skip
        ctx.eps, ctx.y_dtype = eps, None if y is None else y.dtype
        return total, scaled_product(*rounded_h, down, down_scale, down_bias, down_u, down_b, dtype)

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        (total, gate, scale, n, u, q, s, weight, weight_scale, bias, a, b, down, down_scale, down_a,
         down_b) = ctx.saved_tensors  # fmt: skip
        dtype = grad.dtype
        z = scaled_product(q, s, weight, weight_scale, bias, u, b, dtype)
        h = None if down_a is None else F.gelu(z, approximate="tanh")
        down_u = None if down_a is None else h @ down_a.T
        grad_h, grad_down_a, grad_down_b = _backward(grad, quantised(grad, down_scale), h, down_u, down, down_a,
                                                     down_b, dtype)  # fmt: skip
        grad_z, *rounded = quantised_gelu_backward(grad_h, z, weight_scale, a is not None)
        grad_n, grad_a, grad_b = _backward(grad_z, rounded, n, u, weight, a, b, dtype)
        grads = _norm_backward(ctx, total, grad_total, grad_n, gate, scale)
        return *grads, *[None] * 8, grad_a, grad_b, *[None] * 3, grad_down_a, grad_down_b


def _norm_backward(ctx, total: Tensor, grad_total: Tensor, grad_n: Tensor, gate: Tensor | None, scale: Tensor):
    """The gradients of x and y."""
    grad_x, grad_y = modulated_norm_backward(total, grad_total, grad_n, gate, scale, ctx.eps)
    if ctx.y_dtype is None:
        return grad_x, None
    return grad_x, (grad_x if gate is None else grad_y).to(ctx.y_dtype)


if triton is not None:
    from .kernels import normed_row, tl

    @triton.jit
    def _power(largest):
        """The least power of two by which e4m3 holds a number, and its inverse."""
        bits = (tl.maximum(largest, 1e-30) * (1 / 448.0)).to(tl.int32, bitcast=True)
        exponent = (bits + 0x7FFFFF) >> 23
        return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def _round_row(x, at, inside, q, scales, row):
        """Store a row in e4m3, and its scale."""
        scale, inverse = _power(tl.max(tl.abs(tl.where(inside, x, 0.0)), 0))
        tl.store(q + at, (x * inverse).to(q.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _round_parts(first, second, at, rest, inside, q, scales, row):
        """`_round_row` of a row in two parts; the second is 0 where it is not `inside`."""
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

    @triton.jit
    def _gelu(z):
        # 1 + tanh(w) = 2 sigmoid(2 w)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))

    @triton.jit
    def _gelu_slope(z):
        inner = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        s = tl.sigmoid(inner)
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)

    # A row as two blocks, of which the first is full: 8,960 numbers are 8,192 and 768, where one block would be 16,384
    # wide, and exponentials, not memory, would take the time.

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
        x, y, gate, scale, shift, total, n, q, scales, length, width, scale_stride, shift_stride, gate_stride,
        eps: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK)
        inside = d < width
        normed = normed_row(x, y, gate, scale, shift, total, row, length, width, scale_stride, shift_stride,
                            gate_stride, eps, d, inside)  # fmt: skip
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
