"""The objectives of the forward-process methods once more, from velocities: v, v_old, v_ref and the target v*, (B, n).

x_t = (1 - t) x0 + t e,    v* = e - x0,    x0^ = x_t - t v
"""

import torch
from torch import Tensor


def nft(v, target, old, advantages, time, *, mixture, contrast, widths=None):
    """(losses (B,), (w+, w-)); `widths` are taken as given, by default as they are at v."""
    r = (advantages.clamp(-contrast, contrast) / (2 * contrast) + 0.5).clamp(0, 1)
    plus, minus = mixture * v + (1 - mixture) * old, (1 + mixture) * old - mixture * v
    widths = widths or tuple((time * (side - target)).detach().abs().mean(1).clamp(min=1e-5) for side in (plus, minus))
    errors = [(time * (side - target)).square().mean(1) / width for side, width in zip((plus, minus), widths)]
    return contrast / mixture * (r * errors[0] + (1 - r) * errors[1]), widths


def awm(v, target, old, average, advantages, time, *, power, epsilon, average_weight):
    """PPO's clip of rho = p / p_old with log p = - t (l^p - 1e-10^p) / p, and the tie to the average."""

    def log_p(velocity: Tensor) -> Tensor:
        error = (velocity - target).square().mean(1) + 1e-10
        return -time * (error**power - 1e-10**power) / power

    rho = (log_p(v) - log_p(old)).exp()
    unclipped, clipped = -advantages * rho, -advantages * rho.clamp(1 - epsilon, 1 + epsilon)
    return torch.maximum(unclipped, clipped) + average_weight * (v - average).square().mean(1)


def rvm(v, target, reference, advantages, *, reward_scale, beta):
    """The regressions whose gradient the method's is: a / 2 mean (v - v*)^2 + b_ref / 2 mean (v - v_ref)^2."""
    own, tie = (v - target).square().mean(1), (v - reference).square().mean(1)
    return reward_scale * advantages * own / 2 + beta * tie / 2


def flow_dpo(v, target, reference, *, beta, sft_weight):
    """(P,) for rows winner, loser, winner, loser ..."""
    error = (v - target).square().mean(1)
    gain = error - (reference - target).square().mean(1)
    return (1 + (beta / 2 * (gain[::2] - gain[1::2])).exp()).log() + sft_weight * error[::2]
