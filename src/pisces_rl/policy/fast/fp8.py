"""Optional speed: products of a frozen base in FP8, the same in sampling, update and backward.

A frozen weight W (N, K) is rounded once to e4m3, four bits of precision, with a power-of-two scale t_n per row. The
rows of an input are rounded alike, if possible by the kernel that writes them (that of `modulated_norm` or a GELU):

    y_mn = s_m t_n sum_k x8_mk w8_nk + b_n + (u B^T)_mn,    u = x A^T,

summed by cuBLAS with fast accumulation, or in fp32 on a CPU. LoRA's part stays in the input's dtype, and its A and B
get their gradients from x itself. Backward's product with the base is also in FP8: the gradient, times t along the
sum, is rounded by rows as x is,

    dL/dx_mk = r_m sum_n g8_mn w8_nk + (g B A)_mk,    r_m g8_mn ~ g_mn t_n.

So the base takes one byte per weight, and sampling runs the same graph as training. Scales are powers of two: e4m3 has
its own exponent, so other scales gain no precision, and multiplying by a power of two is exact. On a device without
FP8 the products are computed in fp32 from the same rounded values (CPU) or refused (`check_device`).
Format and scaling: Micikevicius et al., arXiv 2209.05433.
"""

import functools
import types
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fp8_kernels import (
    E4M3,
    quantised,
    quantised_gelu,
    quantised_gelu_backward,
    quantised_norm,
    rounded_rows,
    scaled_product,
    transposed,
)
from .kernels import modulated_norm_backward

MULTIPLE = 16  # FP8 products need widths that are multiples of this
CAPABILITY = (8, 9)  # NVIDIA's first compute capability with FP8 products


class FP8Linear(nn.Linear):
    """A frozen linear layer whose weight is stored in e4m3: bits (out, in) in `weight`, scales in `weight_scale`.

    Bits are held as uint8, so that no cast of the module changes them, and no library takes their dtype as the one to
    compute in. Scales stay fp32. On CUDA the product is computed in bf16, whatever the dtype of x, and is cast.
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
    """Raise a ValueError if a device cannot compute FP8 products."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda" or torch.version.cuda is None:
        raise ValueError(f"base_precision='fp8' needs an NVIDIA GPU (or a CPU, for tests), not {device}. Unset it.")
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        raise ValueError(
            f"base_precision='fp8' needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} (Ada, Hopper or "
            f"later); {torch.cuda.get_device_name(device)} has {'.'.join(map(str, have))}. Unset it."
        )


_SAVING = ContextVar("_SAVING", default=False)  # whether weights are saved as numbers, not bits


def save_numbers(denoiser: nn.Module) -> None:
    """Make `denoiser.save_pretrained` write FP8 weights as numbers in bf16, which is exact; bits would be loaded as if
    they were numbers."""
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
    """Convert a frozen linear layer to an `FP8Linear`, in place."""
    bits, scale = rounded_rows(layer.weight.data)
    layer.__class__ = FP8Linear
    layer.weight = nn.Parameter(bits.view(torch.uint8), requires_grad=False)
    layer.register_buffer("weight_scale", scale.flatten())


def serves_fp8(layer: nn.Module) -> bool:
    """Return whether `quantise` supports a layer."""
    return (
        type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and not layer.in_features % MULTIPLE
        and not layer.out_features % MULTIPLE
    )


def dequantised(layer: FP8Linear) -> Tensor:
    """Return a layer's weight as numbers in fp32; bf16 also holds them exactly."""
    return layer.weight.view(E4M3).float() * layer.weight_scale.float()[:, None]


# --- functions of a block ---


def _backward(
    grad: Tensor,
    rounded: tuple[Tensor, Tensor],
    x: Tensor | None,
    u: Tensor | None,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B.

    Args:
        grad: the gradient of y.
        rounded: `grad` times the weight's scales in e4m3, with its row scales.
        x: the input, None without LoRA.
        u: x A^T, None without LoRA.
        weight: the weight's bits.
        a: A, None without LoRA.
        b: B, None without LoRA.
        dtype: of the gradient of x.
    """
    grad_u = None if a is None else grad @ b
    ones = torch.ones(weight.shape[1], device=weight.device)  # the rounded gradient includes the scales
    grad_x = scaled_product(*rounded, transposed(weight), ones, None, grad_u, None if a is None else a.T, dtype)
    return (grad_x, None, None) if a is None else (grad_x, grad_u.T @ x, grad.T @ u)


class FP8Product(torch.autograd.Function):
    """y (M, N) from x (M, K), a weight's bits and scales, a bias, A (R, K) and B (N, R)."""

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
    """x' = x + gate * y and the `FP8Product` of its modulated norm; arguments as in `linear.NormProduct`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        dtype: torch.dtype,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ):
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
    """x' = x + gate * y and the feed-forward GELU(n W^T + b) V^T + c of its modulated norm n, with optional LoRAs.

    The GELU's output is rounded by the kernel that computes it, and so is its gradient.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        dtype: torch.dtype,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        down: Tensor,
        down_scale: Tensor,
        down_bias: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
    ):
        total, n, *rounded = quantised_norm(x, y, gate, scale, shift, eps, a is not None, dtype)
        total, u = x if y is None else total, None if a is None else n @ a.T
        z = scaled_product(*rounded, weight, weight_scale, bias, u, b, dtype)
        h, *rounded_h = quantised_gelu(z, down_a is not None)
        down_u = None if down_a is None else h @ down_a.T
        ctx.save_for_backward(
            total, gate, scale, n, u, *rounded, weight, weight_scale, bias, a, b, down, down_scale, down_a, down_b
        )
        ctx.eps, ctx.y_dtype = eps, None if y is None else y.dtype
        return total, scaled_product(*rounded_h, down, down_scale, down_bias, down_u, down_b, dtype)

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        (total, gate, scale, n, u, q, s, weight, weight_scale, bias, a, b, down, down_scale, down_a, down_b) = (
            ctx.saved_tensors
        )
        dtype = grad.dtype
        z = scaled_product(q, s, weight, weight_scale, bias, u, b, dtype)
        h = None if down_a is None else F.gelu(z, approximate="tanh")
        down_u = None if down_a is None else h @ down_a.T
        grad_h, grad_down_a, grad_down_b = _backward(
            grad, quantised(grad, down_scale), h, down_u, down, down_a, down_b, dtype
        )
        grad_z, *rounded = quantised_gelu_backward(grad_h, z, weight_scale, a is not None)
        grad_n, grad_a, grad_b = _backward(grad_z, rounded, n, u, weight, a, b, dtype)
        grads = _norm_backward(ctx, total, grad_total, grad_n, gate, scale)
        return *grads, *[None] * 8, grad_a, grad_b, *[None] * 3, grad_down_a, grad_down_b


def _norm_backward(ctx, total: Tensor, grad_total: Tensor, grad_n: Tensor, gate: Tensor | None, scale: Tensor):
    """Return the gradients of x and y."""
    grad_x, grad_y = modulated_norm_backward(total, grad_total, grad_n, gate, scale, ctx.eps)
    if ctx.y_dtype is None:
        return grad_x, None
    return grad_x, (grad_x if gate is None else grad_y).to(ctx.y_dtype)
