"""The simple rewards on clips whose value is known, and their gradients."""

import pytest
import torch

from pisces_rl.rewards import exposure, motion_amount, temporal_smoothness

ALL = [temporal_smoothness, motion_amount, exposure]


def clip(levels) -> torch.Tensor:
    """One clip of uniform frames with the given brightness."""
    return torch.tensor(levels).view(1, -1, 1, 1, 1).expand(1, len(levels), 3, 4, 4).clone()


@pytest.mark.parametrize(
    "levels, smoothness, motion, exposed",
    [
        ([0.5, 0.5, 0.5, 0.5], 1.0, 0.0, 1.0),
        ([0.0, 0.1, 0.2, 0.3], 1.0, 0.1, 0.3),
        ([0.0, 1.0, 0.0, 1.0], -1.0, 1.0, 1.0),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 0.0, 0.0),
        ([0.0, 0.0, 1.0, 1.0], 0.0, 1 / 3, 1.0),
    ],
    ids=["still", "fade", "flicker", "white", "cut"],
)
def test_known_clips(levels, smoothness, motion, exposed):
    videos = clip(levels)
    for reward, expected in zip(ALL, (smoothness, motion, exposed)):
        assert reward(videos=videos, prompts=["a"]).tolist() == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("reward", ALL, ids=lambda r: r.__name__)
def test_batch_mates_change_nothing(reward):
    videos = torch.rand(4, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    together = reward(videos=videos)
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.cat([reward(videos=v[None]) for v in videos]))


@pytest.mark.parametrize("reward", ALL, ids=lambda r: r.__name__)
def test_gradient_equals_its_finite_difference(reward):
    assert reward.differentiable is True
    generator = torch.Generator().manual_seed(1)
    videos = torch.rand(2, 5, 3, 4, 4, generator=generator, dtype=torch.double, requires_grad=True)
    direction = torch.randn(videos.shape, generator=generator, dtype=torch.double)
    (gradient,) = torch.autograd.grad(reward(videos=videos).sum(), videos)
    step = 1e-6  # the kinks of |.| are far from random values
    with torch.no_grad():
        change = reward(videos=videos + step * direction) - reward(videos=videos - step * direction)
    assert float((gradient * direction).sum()) == pytest.approx(float(change.sum()) / (2 * step), rel=1e-5)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("reward, frames", [(temporal_smoothness, 2), (motion_amount, 1)])
def test_too_few_frames(reward, frames):
    with pytest.raises(ValueError, match=f"videos have {frames} frame.*needs at least"):
        reward(videos=torch.zeros(1, frames, 3, 4, 4))
