"""Cross-attention whose weights a reward may change, for any model that uses transformers' attention interface.

A layer calls `fused_attention`. If its `fusion` changes the layer, the fusion computes the attention weights.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pisces_rl.ot.costs import as_float

NAME = "pisces_rl_fused"


class Fusion(Protocol):
    """A change to attention, bound to a batch of texts and videos."""

    def changes(self, layer: int) -> bool:
        """Return whether it changes this layer at all."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        logits: Tensor,
        scaling: float,
        mask: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return attention weights (B, H, N, M) in `dtype` for query (B, H, N, d), key (B, H, M, d), their logits =
        scaling query key^T, and the mask that the layer would add to the logits."""


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    fusion: Fusion | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Return the attention of query (B, H, N, d) to key and value (B, H, M, d), as (B, N, H, d)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if fusion is None or not fusion.changes(module.layer_idx):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False
        )
    with torch.autocast(query.device.type, enabled=False):
        logits = (as_float(query) * scaling) @ as_float(key).mT
    weights = fusion(module.layer_idx, query, key, logits, scaling, attention_mask, value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, fused_attention)


def route(module: nn.Module) -> None:
    """Route one attention module through `fused_attention`, leaving its model's other layers alone."""
    config = module.config.__class__.from_dict(module.config.to_dict())
    config._attn_implementation = NAME
    module.config = config
