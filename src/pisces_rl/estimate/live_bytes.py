"""Count the bytes that an allocator would hold at the same time while operators run."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BLOCK = 512  # torch's CUDA allocator rounds sizes up to a multiple
# Functions that autocast computes in fp32 on CUDA but not on the CPU (torch's list of autocast operators).
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
    """Context that counts every tensor that an operator creates until its storage is freed.

    A view and its base count once. Fake tensors give the same count as real ones, without computation.

    Attributes:
        live: bytes now alive of tensors created or held since the count began.
        peak: maximum of `live`.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, {}

    def hold(self, *tensors) -> None:
        """Count tensors that already exist."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._count(tensor)

    def leave_out(self, *tensors) -> None:
        """Exclude tensors that already exist from the count, even if an operator returns them."""
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
    """Context in which CPU operators allocate what CUDA's do: attention never materializes its scores, and norms under
    autocast are fp32. Masks hide nothing (Mochi selects the text's real tokens by its mask)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = torch.is_autocast_enabled("cpu")
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is torch.nonzero and not kwargs.get(
            "as_tuple"
        ):  # fake tensors have no values: assume that none is 0
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
    """Attention with the memory of a fused kernel: query, key, value, output and one number per query."""
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
