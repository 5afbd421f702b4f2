"""Costs between two batches of points, in fp32 (fp64 stays fp64), differentiable."""

import contextlib

import torch
from torch import Tensor

EPS = 1e-12  # shorter vectors count as zero


@contextlib.contextmanager
def exact_products(device: torch.device):
    """No autocast, no TF32 or bf16 in products; everything as it was afterwards, also on an error."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = "none"  # inherited, as it may have been: what is read does not tell
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def as_float(x: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def squared_cost(x: Tensor, y: Tensor) -> Tensor:
    """C_ij = |x_i - y_j|^2 / 2, (..., N, M) for points (..., N, D) and (..., M, D): geomloss's cost for p = 2.

    Computed from inner products, after both sets are centred on the mean of y, and clamped at 0: exact to about 1e-6
    of the largest squared norm.
    """
    with exact_products(x.device):
        x, y = as_float(x), as_float(y)
        center = y.detach().mean(-2, keepdim=True)
        x, y = x - center, y - center
        norms = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
        return (norms / 2 - x @ y.transpose(-1, -2)).clamp_min(0)


def unit(x: Tensor) -> Tensor:
    """Vectors (..., D) of length 1; a zero vector stays zero and gets no gradient (`normalize` alone: some 1e12)."""
    zero = x.norm(dim=-1, keepdim=True) < EPS
    return torch.nn.functional.normalize(x, dim=-1, eps=EPS).masked_fill(zero, 0.0)


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """C_ij = 1 - cos(x_i, y_j), (..., N, M); a zero vector is at right angles to all. Equal to `squared_cost` of unit
    vectors."""
    with exact_products(x.device):
        x, y = as_float(x), as_float(y)
        return 1 - unit(x) @ unit(y).transpose(-1, -2)
