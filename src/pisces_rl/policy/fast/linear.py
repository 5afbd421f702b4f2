"""Linear layers with LoRA, a GELU and the norm before them, in fewer passes over memory.

peft computes y = x W^T + b + s (x A^T) B^T as three products and a sum. With u = x A^T,

    y = [x, u] [W, s B]^T + b

is one product with K = in + r, accumulated in fp32 like the product with W alone; no merged weight is rounded. Layers
with the same x, such as self attention's projections, become one product,

    [q, k, v] = [x, u_q, u_k, u_v] [[W_q, s B_q, 0, 0], [W_k, 0, s B_k, 0], [W_v, 0, 0, s B_v]]^T + b,

and so does the gradient of x: [g, g s B] [[W], [A]]. A GELU after a projection is computed in the product's epilogue;
backward recomputes its argument. A norm before a projection, with the residual sum before it, writes [n, n A^T]
directly (`kernels.modulated_norm`). Only x, A and B get gradients: everything else is frozen.
"""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from peft.tuners.lora import Linear
from torch import Tensor, nn

from .fp8 import FP8FeedForward, FP8Linear, FP8NormProduct, FP8Product
from .kernels import modulated_norm, modulated_norm_backward, operator


@operator
def gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x W^T + b) in its tanh approximation; x (n, in), W (out, in). This is an operator, since a compiler
    would split product and activation again."""
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)  # cuBLAS's epilogue is the tanh form
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@torch.library.register_fake("pisces_rl::gelu_product")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def linear(joined: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor | None, gelu: bool) -> Tensor:
    weights = weight if b is None else torch.cat([weight, b], 1)
    return gelu_product(joined, weights, bias) if gelu else F.linear(joined, weights, bias)


def gelu_argument_gradient(
    grad: Tensor, joined: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor | None
) -> Tensor:
    """Return the gradient of z from that of GELU(z); z is recomputed."""
    return torch.ops.aten.gelu_backward(grad, linear(joined, weight, bias, b, False), approximate="tanh")


def with_product(grad: Tensor, b: Tensor | None) -> Tensor:
    """Return [g, g B], or g without an adapter."""
    return grad if b is None else torch.cat([grad, grad @ b], 1)


def linear_backward(
    grads: Tensor, joined: Tensor, weight: Tensor, a: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B from [g, g B] and [x, x A^T]."""
    if a is None:
        return grads @ weight, None, None
    (grad, grad_u), (x, u) = (t.split([n, len(a)], 1) for t, n in zip((grads, joined), weight.shape))
    return grads @ torch.cat([weight, a]), grad_u.T @ x, grad.T @ u


class Product(torch.autograd.Function):
    """y = [x, x A^T] [W, B]^T + b, with an optional GELU; x (n, in), W (out, in), A (R, in), B (out, R)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, gelu: bool):
        ctx.save_for_backward(x, weight, bias, a, b)
        ctx.gelu = gelu
        return linear(x if a is None else torch.cat([x, x @ a.T], 1), weight, bias, b, gelu)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, a, b = ctx.saved_tensors
        joined = x if a is None else torch.cat([x, x @ a.T], 1)
        if ctx.gelu:
            grad = gelu_argument_gradient(grad, joined, weight, bias, b)
        grad_x, grad_a, grad_b = linear_backward(with_product(grad, b), joined, weight, a)
        return grad_x, None, None, grad_a, grad_b, None


class NormProduct(torch.autograd.Function):
    """x' = x + gate * y and the `Product` of its modulated norm; x and y (B, L, in), gate, scale and shift (B, in).

    Without y, x' is x, passed through so that its gradient is added in the pass that computes the norm's.
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
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        gelu: bool,
    ):
        total, joined = modulated_norm(x, y, gate, scale, shift, eps, a, weight.dtype)
        total = x if y is None else total
        ctx.save_for_backward(total, gate, scale, joined, weight, bias, a, b)
        ctx.eps, ctx.gelu, ctx.y_dtype = eps, gelu, None if y is None else y.dtype
        return total, linear(joined, weight, bias, b, gelu)

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        total, gate, scale, joined, weight, bias, a, b = ctx.saved_tensors
        if ctx.gelu:
            grad = gelu_argument_gradient(grad, joined, weight, bias, b)
        grad_n, grad_a, grad_b = linear_backward(with_product(grad, b), joined, weight, a)
        grad_x, grad_y = modulated_norm_backward(total, grad_total, grad_n, gate, scale, ctx.eps)
        if ctx.y_dtype is not None:
            grad_y = (grad_x if gate is None else grad_y).to(ctx.y_dtype)
        else:
            grad_y = None
        return grad_x, grad_y, None, None, None, None, None, None, grad_a, grad_b, None


def gathered(layers: list[nn.Module], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return W, b, A and s B of layers side by side; for FP8 layers, the weight's bits and scales instead of W."""
    a = b = None
    bases = layers
    if isinstance(layers[0], Linear):
        bases = [layer.get_base_layer() for layer in layers]
        names = [layer.active_adapters[0] for layer in layers]
        a = torch.cat([layer.lora_A[name].weight for layer, name in zip(layers, names)]).to(dtype)
        b = [layer.scaling[name] * layer.lora_B[name].weight for layer, name in zip(layers, names)]
        b = torch.block_diag(*b).to(dtype)

    def together(name: str) -> Tensor | None:
        values = [getattr(base, name) for base in bases]
        return torch.cat(values) if len(values) > 1 else values[0]

    weight = together("weight")
    weights = (weight, together("weight_scale")) if isinstance(bases[0], FP8Linear) else (weight.to(dtype),)
    bias = None if bases[0].bias is None else together("bias").to(dtype)
    return *weights, bias, a, b


def compute_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype of a product with x: autocast's if enabled, else `dtype`, by default that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype or x.dtype


def product(x: Tensor, layers: list[nn.Module], gelu: bool = False) -> Tensor:
    """Return [layer(x) for layer in layers] side by side, (..., sum of out), for layers that `are_one_product`."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.flatten(0, -2).to(dtype)
        if is_fp8(layers):
            y = FP8Product.apply(rows, *gathered(layers, dtype))
            y = F.gelu(y, approximate="tanh") if gelu else y
        else:
            y = Product.apply(rows, *gathered(layers, dtype), gelu)
    return y.unflatten(0, x.shape[:-1])


def norm_product(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    layers: list[nn.Module],
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x' = x + gate * y and the `product` of its layer norm * scale + shift; x, y (B, L, D), others (B, D)."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if is_fp8(layers):
            x, out = FP8NormProduct.apply(x, y, gate, scale, shift, eps, dtype, *gathered(layers, dtype))
            out = F.gelu(out, approximate="tanh") if gelu else out
        else:
            x, out = NormProduct.apply(x, y, gate, scale, shift, eps, *gathered(layers, dtype), gelu)
    return x, out.unflatten(0, x.shape[:2])


def norm_feed_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    up: nn.Module,
    rest: list[nn.Module],
) -> tuple[Tensor, Tensor]:
    """Return `norm_product` with the layer `up` and a GELU, then apply `rest`; in FP8 as one function if possible."""
    down = rest[-1]
    fp8 = len(rest) == 2 and isinstance(rest[0], nn.Dropout) and rest[0].p == 0
    if not (fp8 and is_fp8([up]) and are_one_product([down]) and is_fp8([down])):
        x, y = norm_product(x, y, gate, scale, shift, eps, [up], gelu=True)
        for layer in rest:
            y = layer(y)
        return x, y
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x, out = FP8FeedForward.apply(
            x, y, gate, scale, shift, eps, dtype, *gathered([up], dtype), *gathered([down], dtype)
        )
    return x, out.unflatten(0, x.shape[:2])


def are_one_product(layers: list[nn.Module]) -> bool:
    """Return whether layers are all plain and frozen, or all LoRA layers that are `is_one_product`."""
    plain = all(type(layer) in (nn.Linear, FP8Linear) and not layer.weight.requires_grad for layer in layers)
    return (plain or all(is_one_product(layer) for layer in layers)) and len({is_fp8([x]) for x in layers}) == 1


def is_fp8(layers: list[nn.Module]) -> bool:
    """Return whether the base of layers that `are_one_product` is in FP8."""
    return isinstance(layers[0].get_base_layer() if isinstance(layers[0], Linear) else layers[0], FP8Linear)


def is_one_product(layer: nn.Module) -> bool:
    """Return whether a LoRA layer has one adapter, active and not merged, without dropout, DoRA or a LoRA bias."""
    if type(layer) is not OneProductLinear or layer.disable_adapters or layer.merged:
        return False
    name = layer.active_adapters[0]
    return (
        len(layer.active_adapters) == 1
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )


class OneProductLinear(Linear):
    """peft's LoRA layer, computed as one product."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not is_one_product(self):
            return super().forward(x, *args, **kwargs)
        return product(x, [self])


class OneProductGELU(GELU):
    """diffusers' projection with a tanh GELU, computed as one product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not are_one_product([self.proj]):
            return super().forward(hidden_states)
        return product(hidden_states, [self.proj], gelu=True)
