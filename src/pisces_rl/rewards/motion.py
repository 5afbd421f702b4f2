"""Simple rewards that measure exactly what their names say."""

from torch import Tensor


def temporal_smoothness(videos: Tensor, **kwargs: object) -> Tensor:
    """Return 1 - mean |x_{t+1} - 2 x_t + x_{t-1}|, 1 for a still or steadily fading clip.

    Args:
        videos: (B, F, 3, H, W) in [0, 1], F >= 3.

    Returns:
        (B,) in [-1, 1], differentiable. A frozen clip scores highest: combine it with a reward that asks for content.
    """
    if videos.shape[1] < 3:
        raise ValueError(f"videos have {videos.shape[1]} frames; temporal_smoothness needs at least 3.")
    acceleration = videos[:, 2:] - 2 * videos[:, 1:-1] + videos[:, :-2]
    return 1 - acceleration.abs().flatten(1).mean(1)


def motion_amount(videos: Tensor, **kwargs: object) -> Tensor:
    """Return mean |x_{t+1} - x_t|: how much the pixels change between frames. 0 for a frozen clip.

    Args:
        videos: (B, F, 3, H, W) in [0, 1], F >= 2.

    Returns:
        (B,) in [0, 1], differentiable. Noise scores high: combine it with `temporal_smoothness`.
    """
    if videos.shape[1] < 2:
        raise ValueError(f"videos have {videos.shape[1]} frame; motion_amount needs at least 2.")
    return (videos[:, 1:] - videos[:, :-1]).abs().flatten(1).mean(1)


def exposure(videos: Tensor, **kwargs: object) -> Tensor:
    """Return 1 - 2 |mean brightness - 1/2|: 1 for a clip of medium brightness, 0 for black or white.

    Args:
        videos: (B, F, 3, H, W) in [0, 1].

    Returns:
        (B,) in [0, 1], differentiable.
    """
    return 1 - 2 * (videos.flatten(1).mean(1) - 0.5).abs()


for _reward in (temporal_smoothness, motion_amount, exposure):
    _reward.differentiable = True  # type: ignore[attr-defined]
