"""The products of a denoising block with fewer passes over memory: LoRA, GELU and rotary embeddings.

peft computes y = x W^T + b + s (x A^T) B^T as three products and a sum. With u = x A^T,

    y = [x, u] [W, s B]^T + b

is one product of K = in + r, accumulated in fp32 like the product with W alone; no merged weight is rounded. Self
attention's three projections of one x become one product,

    [q, k, v] = [x, u_q, u_k, u_v] [[W_q, s B_q, 0, 0], [W_k, 0, s B_k, 0], [W_v, 0, 0, s B_v]]^T + b,

and the gradient of x, too, is one: [g, g s B] [[W], [A]]. A GELU after a projection is computed as the product leaves
its registers; backward computes its argument again. Only A and B get gradients: W is frozen.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft.tuners.lora import Linear
from torch import Tensor, nn


@torch.library.custom_op("pisces_rl::gelu_product", mutates_args=())
def gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x W^T + b), by its tanh approximation; x (n, in), W (out, in). An operator of its own, since a compiler
    would take product and activation apart again."""
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)  # cuBLAS's epilogue is the tanh form
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@gelu_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class _Product(torch.autograd.Function):
    """y = [x, x A^T] [W, B]^T + b, with a GELU where asked; x (n, in), W (out, in), A (R, in), B (out, R)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, gelu: bool):
        joined, weights = x, weight
        if a is not None:
            joined, weights = torch.cat([x, x @ a.T], 1), torch.cat([weight, b], 1)
        ctx.save_for_backward(x, weight, bias, a, b)
        ctx.gelu = gelu
        return gelu_product(joined, weights, bias) if gelu else F.linear(joined, weights, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, a, b = ctx.saved_tensors
        u = None if a is None else x @ a.T
        if ctx.gelu:
            joined, weights = (x, weight) if a is None else (torch.cat([x, u], 1), torch.cat([weight, b], 1))
            grad = torch.ops.aten.gelu_backward(grad, F.linear(joined, weights, bias), approximate="tanh")
        if a is None:
            return grad @ weight, None, None, None, None, None
        grad_u = grad @ b
        grad_x = torch.cat([grad, grad_u], 1) @ torch.cat([weight, a])
        return grad_x, None, None, grad_u.T @ x, grad.T @ u, None


def product(x: Tensor, layers: list[nn.Module], gelu: bool = False) -> Tensor:
    """[layer(x) for layer in layers] side by side, (..., sum of out); all layers plain `Linear`, or all LoRA."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    a = b = None
    bases = layers
    if isinstance(layers[0], Linear):
        bases = [layer.get_base_layer() for layer in layers]
        names = [layer.active_adapters[0] for layer in layers]
        a = torch.cat([layer.lora_A[name].weight for layer, name in zip(layers, names)]).to(dtype)
        b = [layer.scaling[name] * layer.lora_B[name].weight for layer, name in zip(layers, names)]
        b = torch.block_diag(*b).to(dtype)
    weight = torch.cat([base.weight for base in bases]) if len(bases) > 1 else bases[0].weight
    bias = bases[0].bias
    if bias is not None:
        bias = (torch.cat([base.bias for base in bases]) if len(bases) > 1 else bias).to(dtype)
    with torch.autocast(device, enabled=False):
        y = _Product.apply(x.flatten(0, -2).to(dtype), weight.to(dtype), bias, a, b, gelu)
    return y.unflatten(0, x.shape[:-1])


def _is_one_product(layer: nn.Module) -> bool:
    """Whether a LoRA layer has one adapter, on, not merged, and without dropout, DoRA or a bias of its own."""
    if type(layer) is not OneProductLinear or layer.disable_adapters or layer.merged:
        return False
    name = layer.active_adapters[0]
    return (len(layer.active_adapters) == 1 and name in layer.lora_A and name not in layer.lora_variant
            and not layer.lora_bias[name] and isinstance(layer.lora_dropout[name], nn.Identity))  # fmt: skip


class OneProductLinear(Linear):
    """peft's LoRA layer, computed in one product."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not _is_one_product(self):
            return super().forward(x, *args, **kwargs)
        return product(x, [self])


class OneProductGELU(GELU):
    """diffusers' projection with a tanh GELU, computed in one product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (_is_one_product(self.proj) or type(self.proj) is nn.Linear):
            return super().forward(hidden_states)
        return product(hidden_states, [self.proj], gelu=True)


class _RotarySelfAttention:
    """Mixed into the attention processors of Wan and SkyReels-V2: self attention with one product, and pairs rotated
    in one pass, where diffusers assigns the even half and then the odd one."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        layers = [attn.to_q, attn.to_k, attn.to_v]
        plain = all(_is_one_product(layer) for layer in layers) or all(type(layer) is nn.Linear for layer in layers)
        if encoder_hidden_states is not None or rotary_emb is None or not plain:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k, v = product(hidden_states, layers).chunk(3, dim=-1)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        x = dispatch_attention_fn(
            _rotated(q, *rotary_emb), _rotated(k, *rotary_emb), v, attn_mask=attention_mask, dropout_p=0.0,
            is_causal=False, backend=self._attention_backend, parallel_config=self._parallel_config,
        )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](x.flatten(2, 3).type_as(q)))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of x (B, L, heads, D) rotated; cos and sin (1, L, 1, D), each angle's twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


class RotaryWanProcessor(_RotarySelfAttention, WanAttnProcessor):
    """Wan's."""


class RotarySkyReelsProcessor(_RotarySelfAttention, SkyReelsV2AttnProcessor):
    """SkyReels-V2's."""


PROCESSORS = {WanAttnProcessor: RotaryWanProcessor, SkyReelsV2AttnProcessor: RotarySkyReelsProcessor}


def fuse_products(denoiser: nn.Module) -> int:
    """Let a denoiser compute its LoRA layers, its projections with GELU and, in Wan, its self attention as above.

    Parameters, names and saved files stay as they were. Returns how many modules compute otherwise now.
    """
    count = 0
    for module in list(denoiser.modules()):
        if type(module) is Linear and isinstance(module.get_base_layer(), nn.Linear):
            module.__class__ = OneProductLinear
        elif type(module) is GELU and module.approximate == "tanh" and module.proj.bias is not None:
            module.__class__ = OneProductGELU
        elif type(getattr(module, "processor", None)) in PROCESSORS:
            module.processor.__class__ = PROCESSORS[type(module.processor)]
        else:
            continue
        count += 1
    return count


def unfuse_products(denoiser: nn.Module) -> None:
    """Undo `fuse_products`, in a module or a copy of one."""
    for module in denoiser.modules():
        if type(module) is OneProductLinear:
            module.__class__ = Linear
        elif type(module) is OneProductGELU:
            module.__class__ = GELU
        for plain, fused in PROCESSORS.items():
            if type(getattr(module, "processor", None)) is fused:
                module.processor.__class__ = plain


@contextlib.contextmanager
def plain_products(denoiser: nn.Module) -> Iterator[None]:
    """Inside, `fuse_products` is undone."""
    fused = any(type(module) in (OneProductLinear, OneProductGELU) for module in denoiser.modules())
    unfuse_products(denoiser)
    try:
        yield
    finally:
        if fused:
            fuse_products(denoiser)
