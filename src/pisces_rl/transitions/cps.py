"""Coefficient-preserving sampling (Flow-CPS, arXiv 2509.05952)."""

import math

from torch import Tensor


def cps(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor,
    sigma_min: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next state keeps the interpolation's coefficients (1 - s') and s'; part of the noise is fresh.

        x0^ = x - s v,   e^ = x + (1 - s) v,   std = s' sin(a pi / 2)
        mean = (1 - s') x0^ + sqrt(s'^2 - std^2) e^

    It does not keep the marginal in the limit of many steps: at a = 0.7 a Gaussian of standard deviation .300 comes
    out as .253 after 1,000 steps. Flow-CPS scores with the unscaled -(x' - m)^2; here log p is the Gaussian's, as for
    every transition, so clip ranges mean the same thing everywhere. Arguments as in `flow_sde`.
    """
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * x0 + (sigma_next**2 - std**2).clamp(min=0).sqrt() * noise, std
