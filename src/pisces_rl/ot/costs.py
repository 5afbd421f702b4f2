"""Costs between two batches of points, differentiable, in fp32 (fp64 inputs stay fp64)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS = 1e-12  # vectors shorter than this count as zero
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.linear.default}


class _InDoublePrecision(TorchDispatchMode):
    """A mode, for this thread only, that computes products of fp32 tensors in fp64 and rounds the result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        if func not in _PRODUCTS or args[0].dtype != torch.float32:
            return func(*args, **kwargs or {})
        args = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **kwargs or {}).float()


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Disable autocast and avoid TF32 and bf16 in matrix products.

    Torch's precision setting applies to all threads, so changing it here would change what the denoiser computes at
    the same time. If the setting is reduced, products run in fp64 instead.
    """
    settings: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    reduced = settings.matmul.fp32_precision in ("tf32", "bf16")
    with torch.autocast(device.type, enabled=False), _InDoublePrecision() if reduced else contextlib.nullcontext():
        yield


def as_float(x: Tensor) -> Tensor:
    """Return float64 unchanged and anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def squared_cost(x: Tensor, y: Tensor) -> Tensor:
    """Return C_ij = |x_i - y_j|^2 / 2, (..., N, M), for points (..., N, D) and (..., M, D): geomloss's cost for p = 2.

    Computed from inner products after centring both sets on the mean of y, and clamped at 0: exact to about 1e-6 of
    the largest squared norm.
    """
    with exact_products(x.device):
        x, y = as_float(x), as_float(y)
        center = y.detach().mean(-2, keepdim=True)
        x, y = x - center, y - center
        norms = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
        return (norms / 2 - x @ y.transpose(-1, -2)).clamp_min(0)


def unit(x: Tensor) -> Tensor:
    """Scale vectors (..., D) to length 1. A zero vector stays zero with no gradient (`normalize` gives about 1e12)."""
    zero = x.norm(dim=-1, keepdim=True) < EPS
    return torch.nn.functional.normalize(x, dim=-1, eps=EPS).masked_fill(zero, 0.0)


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """Return C_ij = 1 - cos(x_i, y_j), (..., N, M); a zero vector is orthogonal to all others. Equals `squared_cost`
    of unit vectors."""
    with exact_products(x.device):
        x, y = as_float(x), as_float(y)
        return 1 - unit(x) @ unit(y).transpose(-1, -2)
