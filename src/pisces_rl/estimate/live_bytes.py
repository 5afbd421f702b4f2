"""Bytes that live at the same time: a count of what an allocator would hold, kept while operators run."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BLOCK = 512  # torch's CUDA allocator rounds up to it
# What CUDA's autocast computes in fp32 and the CPU's does not (torch's list of autocast operators).
FP32_UNDER_AUTOCAST = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.pow,
    Tensor.pow,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.exp,
    Tensor.exp,
    torch.sum,
    Tensor.sum,
}


class LiveBytes(TorchDispatchMode):
    """Inside, every tensor that an operator makes is counted until its storage is freed.

    Views count once with their base. On fake tensors nothing is computed, and the count is that of real ones.

    Attributes:
        live: bytes alive now, of tensors made or held since this count began.
        peak: the most that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, {}

    def hold(self, *tensors) -> None:
        """Count tensors that were made before."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._count(tensor)

    def leave_out(self, *tensors) -> None:
        """Do not count tensors that were made before, not even where an operator returns them."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._count(tensor, rounded=0)

    def _count(self, tensor: Tensor, rounded: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if rounded is None:
            rounded = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[key] = weakref.ref(storage, lambda _, key=key, size=rounded: self._free(key, size))
        self.live += rounded
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.hold(output)
        return output


class AsOnCUDA(TorchFunctionMode):
    """Inside, operators of the CPU keep what CUDA's keep: attention never makes its scores, norms under autocast
    are fp32. A mask hides nothing (Mochi takes the text's real tokens out of its padding)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = torch.is_autocast_enabled("cpu")
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is torch.nonzero and not kwargs.get("as_tuple"):  # which numbers are not 0 is not known here: all
            return torch.zeros((args[0].numel(), args[0].ndim), dtype=torch.long)
        if cast and function in FP32_UNDER_AUTOCAST:
            args, kwargs = tree_map(_to_fp32, (args, kwargs))
        return function(*args, **kwargs)


def _to_fp32(value):
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What a fused kernel keeps: query, key, value, output and one number a query."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        dropout_p,
        is_causal,
        attn_mask=None if attn_mask is None else attn_mask.to(query.dtype),
        scale=scale,
    )[0]
