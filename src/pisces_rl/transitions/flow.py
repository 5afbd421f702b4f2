"""Transition kernels of flow matching: stochastic samplers with the marginals of the probability-flow ODE.

Notation: x_s = (1 - s) x0 + s e, v = e - x0, s the noise level sigma, dt = s' - s < 0. With diffusion coefficient g,

    mean = x (1 + g^2 dt / 2s) + v (1 + g^2 (1 - s) / 2s) dt,      std = g sqrt(-dt)

Each kernel is a pure function: it returns (mean, std) of p(x' | x, v), the same for sampling and for scoring. At
`noise_level` 0 each is the Euler step of the ODE.
"""

from torch import Tensor


def _euler_maruyama(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    dt = sigma_next - sigma
    drift = g**2 / (2 * sigma)
    mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
    return mean, g * (-dt).sqrt()


def flow_sde(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor,
    sigma_min: Tensor,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's kernel (arXiv 2505.05470, eq. 9): g = a sqrt(s / (1 - min(s, sigma_max))).

    Args:
        x: (..., ) current state, fp32.
        v: predicted velocity, shape of `x`.
        sigma: scalar, at most 1.
        sigma_next: scalar, 0 <= sigma_next < sigma.
        noise_level: a; the paper's value is 0.7.
        sigma_max: the schedule's second sigma. It bounds g at the first step, where 1 - s is 0; the minimum also
            covers schedules that start slightly below 1 (UniPC: 0.99999899), where g would be about 700.
        sigma_min: unused; every flow kernel takes the same arguments.

    Returns:
        (mean, std): shape of `x`, and a scalar.
    """
    g = noise_level * (sigma / (1 - sigma.minimum(sigma_max))).sqrt()
    return _euler_maruyama(x, v, sigma, sigma_next, g)


def flow_sde_linear(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor,
    sigma_min: Tensor,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's variant for Wan: g = a (s_min + (s_max - s_min) s), a = 1. Arguments as in `flow_sde`."""
    g = noise_level * (sigma_min + (sigma_max - sigma_min) * sigma)
    return _euler_maruyama(x, v, sigma, sigma_next, g)


def dance_sde(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float,
    sigma_max: Tensor,
    sigma_min: Tensor,
) -> tuple[Tensor, Tensor]:
    """DanceGRPO's kernel (arXiv 2505.07818): constant g = eta, 0.25 to 0.3. Arguments as in `flow_sde`."""
    return _euler_maruyama(x, v, sigma, sigma_next, sigma.new_tensor(noise_level))
