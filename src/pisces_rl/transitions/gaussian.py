"""The Gaussian that every transition samples from."""

import math

import torch
from torch import Tensor


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor | float, rows_per_video: int = 1) -> Tensor:
    """Return the tempered log-density of `x_next` under N(mean, std^2), one value per video.

        log p = mean over non-batch dimensions of [ -(x' - m)^2 / (2 std^2) - log std - log(2 pi) / 2 ]

    The mean instead of the sum keeps the importance ratio of a video with 10^5 dimensions finite (Flow-GRPO,
    arXiv 2505.05470, does the same); it is the log-density divided by the number of dimensions.

    Args:
        x_next: (B * rows_per_video, ...) next states; any float dtype, computed in fp32.
        mean: same shape as `x_next`.
        std: scalar, or broadcastable to `x_next`; must be positive.
        rows_per_video: rows that belong to one video (pipelines that fold frames into the batch).

    Returns:
        (B,) fp32.
    """
    std = torch.as_tensor(std, dtype=torch.float32)
    if std.ndim:
        std = std.to(mean.device)  # a scalar stays on the CPU: no device synchronisation
    density = -((x_next.float() - mean.float()) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1).view(-1, rows_per_video).mean(1)
