"""Ancestral sampling for a variance-exploding schedule, x = x0 + sigma e, as in EDM (arXiv 2206.00364)."""

from torch import Tensor


def ancestral(
    x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, *, noise_level: float
) -> tuple[Tensor, Tensor]:
    """DDIM's step with eta = `noise_level`, in the coordinates x = x0 + sigma e.

        std  = eta s' sqrt(1 - s'^2 / s^2)
        mean = x0^ + sqrt(s'^2 - std^2) (x - x0^) / s

    With a = 1 / (1 + s^2) and x / sqrt(1 + s^2) in place of x, this is `ddim` for a model that predicts x0. At eta = 1
    it is k-diffusion's Euler ancestral step, at eta = 0 EDM's Euler step. It does not depend on the data's scale.

    Args:
        x: current state, fp32.
        x0: the predicted clean latents (after preconditioning and guidance), shape of `x`.
        sigma: scalar.
        sigma_next: scalar, 0 <= sigma_next <= sigma.
        noise_level: eta in [0, 1].

    Returns:
        (mean, std): shape of `x`, and a scalar.
    """
    std = noise_level * sigma_next * (1 - (sigma_next / sigma) ** 2).clamp(min=0).sqrt()
    return x0 + (sigma_next**2 - std**2).clamp(min=0).sqrt() / sigma * (x - x0), std
