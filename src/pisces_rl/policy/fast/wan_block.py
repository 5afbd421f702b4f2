"""Wan's and SkyReels-V2's blocks in fewer passes over memory, with linear.py and kernels.py.

A block with unsupported layers or inputs (dropout in an adapter, image tokens, one timestep per token) runs diffusers'
code.
"""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor, SkyReelsV2TransformerBlock
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from .kernels import modulated_norm, modulated_norm_backward, rotated_heads, rotated_heads_backward
from .linear import (
    OneProductGELU,
    are_one_product,
    compute_dtype,
    gathered,
    is_fp8,
    linear,
    linear_backward,
    norm_feed_forward,
    norm_product,
    product,
)


class _RotatedHeads(torch.autograd.Function):
    """Normed and rotated queries and keys, and values, (B, L, H, d), from [q, k, v] (B, L, 3 H d)."""

    @staticmethod
    def forward(ctx, qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype):
        q, k = rotated_heads(qkv, weight_q, weight_k, cos, sin, eps, dtype)
        ctx.save_for_backward(qkv, weight_q, weight_k, cos, sin)
        ctx.eps = eps
        return q, k, qkv[..., 2 * qkv.shape[2] // 3 :].view(q.shape)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        qkv, *rest = ctx.saved_tensors
        grad = rotated_heads_backward(qkv, grad_q, grad_k, grad_v, *rest, ctx.eps, None)
        return grad.view(qkv.shape), *[None] * 6


class _NormHeads(torch.autograd.Function):
    """x, passed through, and the heads from the product of its modulated norm: `linear.NormProduct`, `_RotatedHeads`.

    One function, so that backward writes the product's gradient g directly into [g, g B].
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        weight_q: Tensor,
        weight_k: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads_eps: float,
        dtype: torch.dtype,
    ):
        heads = weight_q, weight_k, cos, sin
        _, joined = modulated_norm(x, None, None, scale, shift, eps, a, weight.dtype)
        qkv = linear(joined, weight, bias, b, False).unflatten(0, x.shape[:2])
        q, k = rotated_heads(qkv, *heads, heads_eps, dtype)
        ctx.save_for_backward(x, scale, joined, qkv, weight, a, b, *heads)
        ctx.eps, ctx.heads_eps = eps, heads_eps
        return x, q, k, qkv[..., 2 * qkv.shape[2] // 3 :].view(q.shape)

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        x, scale, joined, qkv, weight, a, b, *heads = ctx.saved_tensors
        grads = rotated_heads_backward(qkv, grad_q, grad_k, grad_v, *heads, ctx.heads_eps, b)
        grad_n, grad_a, grad_b = linear_backward(grads, joined, weight, a)
        grad_x, _ = modulated_norm_backward(x, grad_x, grad_n, None, scale, ctx.eps)
        return grad_x, *[None] * 5, grad_a, grad_b, *[None] * 6


def _norm_and_angles(attn: nn.Module, x: Tensor, dtype: torch.dtype, rotary: tuple[Tensor, Tensor]) -> tuple:
    """Return the arguments of `_RotatedHeads` after qkv, for projections of x in this dtype."""
    weights = attn.norm_q.weight, attn.norm_k.weight
    dtype = compute_dtype(x, torch.promote_types(dtype, weights[0].dtype))
    return *weights, *(angles.flatten(0, 2) for angles in rotary), attn.norm_q.eps, dtype


def _norm_heads(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, attn: nn.Module, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (B, L, D) and self attention's heads (B, L, H, d) of its layer norm * scale + shift, each (B, D)."""
    dtype = compute_dtype(x)
    heads, layers = _norm_and_angles(attn, x, dtype, rotary), [attn.to_q, attn.to_k, attn.to_v]
    if is_fp8(layers):
        x, qkv = norm_product(x, None, None, scale, shift, eps, layers)
        return x, *_RotatedHeads.apply(qkv, *heads)
    with torch.autocast(x.device.type, enabled=False):
        return _NormHeads.apply(x, scale, shift, eps, *gathered(layers, dtype), *heads)


def _self_attention(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention over heads (B, L, H, d), in the dtype of v and before its output projection, (B, L, H d)."""
    processor = attn.processor
    x = dispatch_attention_fn(
        q,
        k,
        v.to(q.dtype),
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return x.flatten(2, 3).to(v.dtype)


def _cross_attention(attn: nn.Module, q: Tensor, context: Tensor) -> Tensor:
    """Return attention of projected queries (B, L, H d) to a text's tokens, before its output projection."""
    layers = [attn.to_k, attn.to_v]
    k, v = product(context, layers).chunk(2, -1) if are_one_product(layers) else [f(context) for f in layers]
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
    x = dispatch_attention_fn(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, backend=attn.processor._attention_backend
    )
    return x.flatten(2, 3).type_as(q)


def _output(attn: nn.Module, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _rotates(attn: nn.Module, rotary) -> bool:
    """Return whether queries and keys are normed with frozen weights and rotated by the same angles in all videos."""
    weights = (attn.norm_q.weight, attn.norm_k.weight)
    return (
        isinstance(rotary, tuple)
        and rotary[0].shape[0] == rotary[0].shape[2] == 1
        and not any(weight is None or weight.requires_grad for weight in weights)
    )


class _OneProductAttention:
    """Mixin for the attention processors of Wan and SkyReels-V2: q, k and v as one product, normed and rotated."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        layers = [attn.to_q, attn.to_k, attn.to_v]
        if encoder_hidden_states is not None or not are_one_product(layers) or not _rotates(attn, rotary_emb):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        qkv = product(hidden_states, layers)
        heads = _RotatedHeads.apply(qkv, *_norm_and_angles(attn, qkv, qkv.dtype, rotary_emb))
        return _output(attn, _self_attention(attn, *heads, attention_mask))


class OneProductWanProcessor(_OneProductAttention, WanAttnProcessor):
    """Wan's attention processor with one product."""


class OneProductSkyReelsProcessor(_OneProductAttention, SkyReelsV2AttnProcessor):
    """SkyReels-V2's attention processor with one product."""


class _FewPassesBlock:
    """Mixin for the blocks of Wan and SkyReels-V2: each norm in one pass with the residual sum before it."""

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb, *mask):
        attn, cross, projection = self.attn1, self.attn2, self.ffn.net[0]
        first, second, third = [attn.to_q, attn.to_k, attn.to_v], [cross.to_q], [projection.proj]
        if not (
            self._is_usual(temb) and _rotates(attn, rotary_emb) and all(map(are_one_product, (first, second, third)))
        ):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb, *mask)
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).unbind(1)
        x = hidden_states.contiguous()  # SkyReels-V2 passes its first block a transposed view
        x, *heads = _norm_heads(x, 1 + scale, shift, self.norm1.eps, attn, rotary_emb)
        y = _output(attn, _self_attention(attn, *heads, *(mask or (None,))))
        weight, bias = (p.float().expand(len(temb), -1) for p in (self.norm2.weight, self.norm2.bias))
        x, q = norm_product(x, y, gate, weight, bias, self.norm2.eps, second)
        y = _output(cross, _cross_attention(cross, q, encoder_hidden_states))
        x, y = norm_feed_forward(x, y, None, 1 + c_scale, c_shift, self.norm3.eps, *third, list(self.ffn.net[1:]))
        return (x.float() + y.float() * c_gate[:, None]).type_as(x)

    def _is_usual(self, temb: Tensor) -> bool:
        """Return whether the block is supported: one timestep per video, a norm before cross attention, no image
        tokens, and nothing trained outside the products."""
        return (
            temb.ndim == 3
            and isinstance(self.norm2, FP32LayerNorm)
            and self.attn2.add_k_proj is None
            and not any(x.requires_grad for x in (temb, self.scale_shift_table, *self.norm2.parameters()))
            and isinstance(self.attn1.processor, _OneProductAttention)
            and isinstance(self.ffn.net[0], OneProductGELU)
        )


class FewPassesWanBlock(_FewPassesBlock, WanTransformerBlock):
    """Wan's block in fewer passes."""


class FewPassesSkyReelsBlock(_FewPassesBlock, SkyReelsV2TransformerBlock):
    """SkyReels-V2's block in fewer passes."""


PROCESSORS = {WanAttnProcessor: OneProductWanProcessor, SkyReelsV2AttnProcessor: OneProductSkyReelsProcessor}
BLOCKS = {WanTransformerBlock: FewPassesWanBlock, SkyReelsV2TransformerBlock: FewPassesSkyReelsBlock}
