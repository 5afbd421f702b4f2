"""LoRA projections in one matrix product.

y = x W^T + b + s (x A^T) B^T costs two more passes over y as two products and a sum. With u = x A^T,

    y = [x, u] [W, s B]^T + b

is one product of K = in + r, accumulated in fp32 like the product with W alone; no merged weight is rounded. Self
attention's three projections of one x become one product,

    [q, k, v] = [x, u_q, u_k, u_v] [[W_q, s B_q, 0, 0], [W_k, 0, s B_k, 0], [W_v, 0, 0, s B_v]]^T + b.

Only A and B get gradients; W is frozen.
"""

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class _LoRAProduct(torch.autograd.Function):
    """y = [x, x A^T] V^T + b with V = [W, s B_blocks]; A (R, in), B_blocks (out, R), R all ranks together."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        u = flat @ a.T
        joined, weights = torch.cat([flat, u], 1), torch.cat([weight, b], 1)
        y = joined @ weights.T if bias is None else torch.addmm(bias, joined, weights.T)
        ctx.save_for_backward(flat, u, weight, a, b)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, u, weight, a, b = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        h = flat @ torch.cat([weight, b], 1)
        grad_u = h[:, weight.shape[1]:]
        grad_x = torch.addmm(h[:, : weight.shape[1]], grad_u, a)
        return grad_x.unflatten(0, grad.shape[:-1]), None, None, grad_u.T @ x, flat.T @ u


def lora_projection(x: Tensor, layers: list[Linear]) -> Tensor:
    """[layer(x) for layer in layers] side by side, (..., sum of out), in one product; each layer's adapter is on."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    bases = [layer.get_base_layer() for layer in layers]
    names = [layer.active_adapters[0] for layer in layers]
    a = torch.cat([layer.lora_A[name].weight for layer, name in zip(layers, names)])
    b = torch.block_diag(*(layer.scaling[name] * layer.lora_B[name].weight for layer, name in zip(layers, names)))
    weight = torch.cat([base.weight for base in bases])
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases]).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _LoRAProduct.apply(x.to(dtype), weight.to(dtype), bias, a.to(dtype), b.to(dtype))


def _is_plain(layer: Linear) -> bool:
    """One adapter, on, not merged, without dropout, DoRA or a bias of its own: what one product computes."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
            and isinstance(layer.lora_dropout[name], nn.Identity))  # fmt: skip


class OneProductLinear(Linear):
    """peft's LoRA layer, computed in one product."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not _is_plain(self):
            return super().forward(x, *args, **kwargs)
        return lora_projection(x, [self])


class _OneProductSelfAttention:
    """Mixed into diffusers' attention modules: their own path for fused projections, with the adapters in it."""

    fused_projections = True

    def to_qkv(self, x: Tensor) -> Tensor:
        layers = [self.to_q, self.to_k, self.to_v]
        if all(_is_plain(layer) for layer in layers):
            return lora_projection(x, layers)
        return torch.cat([layer(x) for layer in layers], -1)


_FUSED: dict[type, type] = {}


def fuse_lora_products(denoiser: nn.Module) -> int:
    """Compute every LoRA layer of a denoiser in one product, and self attention's three in one together.

    Parameters, names and saved files stay as they were. Returns the number of products.
    """
    count = 0
    for module in denoiser.modules():
        if type(module) is Linear and isinstance(module.get_base_layer(), nn.Linear):
            module.__class__ = OneProductLinear
            count += 1
    for module in list(denoiser.modules()):
        own = type(module)
        if getattr(own, "fused_projections", None) is not False or vars(module).get("fused_projections"):
            continue
        if own.__name__ != "WanAttention" or module.is_cross_attention:
            continue
        if all(isinstance(layer, OneProductLinear) for layer in (module.to_q, module.to_k, module.to_v)):
            module.__class__ = _FUSED.setdefault(own, type(own.__name__, (_OneProductSelfAttention, own), {}))
            count -= 2
    return count
