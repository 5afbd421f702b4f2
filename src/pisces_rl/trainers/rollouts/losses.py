"""The clipped policy loss, its KL terms, and weights across denoising steps."""

import torch
from torch import Tensor

from ...transitions import Paper


def clipped_policy_loss(log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """PPO's clipped surrogate for one denoising step, per sample.

        rho = exp(log p - log p_old),   loss = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high))

    Args:
        log_ratio: (B,) log p - log p_old, carries gradients.
        advantage: (B,).

    Returns:
        (B,); the caller divides by the number of samples and of steps.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - epsilon_low, 1 + epsilon_high))


def clip_fractions(
    log_ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """(low, high): shares of the batch whose gradient the clip removed, on either side."""
    ratio = log_ratio.detach().exp()
    low = ((ratio < 1 - epsilon_low) & (advantage < 0)).float().mean()
    high = ((ratio > 1 + epsilon_high) & (advantage > 0)).float().mean()
    return low, high


def kl_to_reference(mean: Tensor, reference_mean: Tensor, std: Tensor, rows_per_video: int = 1) -> Tensor:
    """KL(p || p_ref) of two Gaussians of equal variance, per dimension as log p is: mean |m - m_ref|^2 / (2 std^2).

    Args:
        mean, reference_mean: (B * rows_per_video, ...).
        std: scalar.

    Returns:
        (B,), carries gradients through `mean`.
    """
    return mean_square(mean - reference_mean, rows_per_video) / (2 * std**2)


def prediction_distance(prediction: Tensor, reference: Tensor, rows_per_video: int = 1) -> Tensor:
    """|v - v_ref|^2, the mean over dimensions: the KL's step-independent part. (B,), carries gradients."""
    return mean_square(prediction - reference, rows_per_video)


def mean_square(difference: Tensor, rows_per_video: int = 1) -> Tensor:
    """The mean square of each video, (B * rows_per_video, ...) -> (B,)."""
    return difference.square().flatten(1).mean(1).view(-1, rows_per_video).mean(1)


#: Sources of `step_weighting`.
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
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): a log-ratio with mean 0 and equal spread at every step.

        log rho^ = std (log p - log p_old + mean |m - m_old|^2 / (2 std^2))

    Args:
        log_ratio: (B,).
        mean, old_mean: (B * rows_per_video, ...).
        std: scalar, the transition's.
    """
    return std * (log_ratio + kl_to_reference(mean, old_mean, std, rows_per_video))


def step_weight(kind: str, std: Tensor, gain: Tensor, dt: Tensor) -> Tensor:
    """The weight of one denoising step's policy loss, a scalar.

    The gradient of log p reaches the prediction through |d mean / d prediction| / std, which spans 42x over 20 steps
    at shift 3, so that equal weights train one end of the schedule only.

    Args:
        kind: "none", 1; "longcat", std / |d mean / d prediction|, which cancels that factor (LongCat-Video, arXiv
            2510.22200); "guard", std-normalised ratios are used and the weight is 1 / |dt| (GRPO-Guard).
        std: scalar of the transition.
        gain: |d mean / d prediction|.
        dt: s - s' > 0 (alpha-bar schedules: the step's share of the schedule, 1 / N).
    """
    if kind == "longcat":
        return std / gain.clamp(min=1e-8)
    if kind == "guard":
        return 1 / dt
    return torch.ones_like(std)
