"""The clipped policy loss, its KL terms, and weights of the denoising steps."""

import torch
from torch import Tensor

from ...transitions import Paper


def clipped_policy_loss(log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """PPO's clipped surrogate for one denoising step, per sample.

        rho = exp(log p - log p_old),   loss = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high))

    Args:
        log_ratio: (B,) log p - log p_old, with gradients.
        advantage: (B,) advantages.
        epsilon_low: eps_low.
        epsilon_high: eps_high.

    Returns:
        (B,) losses; the caller divides by the number of samples and of steps.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - epsilon_low, 1 + epsilon_high))


def clip_fractions(
    log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """Return (low, high), the shares of the batch whose gradient the lower and the upper clip removed."""
    ratio = log_ratio.detach().exp()
    low = ((ratio < 1 - epsilon_low) & (advantage < 0)).float().mean()
    high = ((ratio > 1 + epsilon_high) & (advantage > 0)).float().mean()
    return low, high


def kl_to_reference(mean: Tensor, reference_mean: Tensor, std: Tensor, rows_per_video: int = 1) -> Tensor:
    """Return KL(p || p_ref) of two Gaussians of equal variance, mean |m - m_ref|^2 / (2 std^2).

    Like log p, it is a mean over dimensions.

    Args:
        mean: (B * rows_per_video, ...) m.
        reference_mean: m_ref, in the same shape.
        std: standard deviation, a scalar.
        rows_per_video: rows that make up one video.

    Returns:
        (B,), with gradients through `mean`.
    """
    return mean_square(mean - reference_mean, rows_per_video) / (2 * std**2)


def prediction_distance(prediction: Tensor, reference: Tensor, rows_per_video: int = 1) -> Tensor:
    """Return mean |v - v_ref|^2 over dimensions, (B,) with gradients: the part of the KL that all steps share."""
    return mean_square(prediction - reference, rows_per_video)


def mean_square(difference: Tensor, rows_per_video: int = 1) -> Tensor:
    """Return the mean square of each video, (B * rows_per_video, ...) -> (B,)."""
    return difference.square().flatten(1).mean(1).view(-1, rows_per_video).mean(1)


#: Papers behind each value of `step_weighting`.
STEP_WEIGHTING_PAPERS = {
    "none": (),
    "longcat": (Paper("2510.22200", "LongCat-Video Technical Report"),),
    "guard": (
        Paper(
            "2510.22319", "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping"
        ),
    ),
}


def guarded_log_ratio(
    log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor, rows_per_video: int = 1
) -> Tensor:
    """Return the log-ratio after GRPO-Guard's RatioNorm (arXiv 2510.22319): mean 0 and equal spread at every step.

        log rho^ = std (log p - log p_old + mean |m - m_old|^2 / (2 std^2))

    Args:
        log_ratio: (B,) log p - log p_old.
        mean: (B * rows_per_video, ...) m.
        old_mean: m_old, in the same shape.
        std: standard deviation of the transition, a scalar.
        rows_per_video: rows that make up one video.
    """
    return std * (log_ratio + kl_to_reference(mean, old_mean, std, rows_per_video))


def step_weight(kind: str, std: Tensor, gain: Tensor, dt: Tensor) -> Tensor:
    """Return the weight of one denoising step's policy loss, a scalar.

    The gradient of log p reaches the prediction through the factor |d mean / d prediction| / std. Over 20 steps at
    shift 3 it varies by 42x, so equal weights train only one end of the schedule.

    Args:
        kind: "none": 1. "longcat": std / |d mean / d prediction|, which cancels that factor (LongCat-Video, arXiv
            2510.22200). "guard": 1 / |dt|, for use with `guarded_log_ratio` (GRPO-Guard).
        std: standard deviation of the transition, a scalar.
        gain: |d mean / d prediction|.
        dt: s - s' > 0 (alpha-bar schedules: the step's share of the schedule, 1 / N).
    """
    if kind == "longcat":
        return std / gain.clamp(min=1e-8)
    if kind == "guard":
        return 1 / dt
    return torch.ones_like(std)
