"""Gradients of both rewards with respect to pixels: finite differences, and videos where something vanishes."""

import itertools

import pytest
import torch
from rewards.tiny_encoders import MATCHERS, build

from pisces_rl.ot import BankDivergence
from pisces_rl.ot.maps import LinearMap
from pisces_rl.rewards.ot_attention import FUSIONS, PLANS, OTAttention
from pisces_rl.rewards.quality import OTQualityReward
from pisces_rl.rewards.semantic import OTSemanticReward

PROMPTS = ["a red circle moving left", "two blue squares on black", ""]
FUSED = [(fusion, 0.0) for fusion in FUSIONS] + [("log", 1e-3)]  # and floors


@pytest.mark.parametrize("fusion, floor", FUSED)
@pytest.mark.parametrize("name", MATCHERS)
def test_gradients_of_the_semantic_reward(name, fusion, floor):
    """The plan is a constant to gradients, so the finite difference holds it fixed, too."""
    encoder = build(name, torch.float64)
    generator = torch.Generator().manual_seed(3)
    videos = 0.2 + 0.6 * torch.rand(2, 3, 3, 16, 16, generator=generator, dtype=torch.float64)
    direction = torch.randn(videos.shape, generator=generator, dtype=torch.float64)
    settings = OTAttention(fusion=fusion, floor=floor, tolerance=1e-6)
    kept = []

    class Held(type(settings.bind(torch.ones(1, 1).bool(), torch.zeros(1, 3)))):
        def solve(self, cost):
            kept.append(super().solve(cost)) if recording else None
            return kept[next(index)]

    def value(x):
        text, video = encoder.encode_text(PROMPTS[:2]), encoder.encode_video(x)
        return encoder.match(text, video, Held(settings, text.words, video.positions)).softmax(1)[:, 1].sum()

    recording, index = True, itertools.count()
    videos.requires_grad_()
    (gradient,) = torch.autograd.grad(value(videos), videos)
    (own,) = torch.autograd.grad(OTSemanticReward(encoder, settings)(PROMPTS[:2], videos).sum(), videos)
    torch.testing.assert_close(own, gradient)
    recording, slopes = False, []
    for sign in (1, -1):
        index = itertools.count()
        with torch.no_grad():
            slopes.append(value(videos + sign * 1e-5 * direction))
    slope = float(slopes[0] - slopes[1]) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-9)


def mapped_quality(dtype=torch.float32):
    """A quality reward with a map and a bank, both terms."""
    encoder, generator = build("tiny_vtm", dtype), torch.Generator().manual_seed(0)
    text, video = torch.randn(2, 50, 10, generator=generator, dtype=dtype)
    ot_map = LinearMap(encoder=encoder.name).fit(text, 2 * video + 1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    bank = BankDivergence(torch.nn.functional.normalize(video, dim=1), blur=0.5, tolerance=tolerance)
    return OTQualityReward(encoder, ot_map, bank=bank, divergence_weight=0.5)


def test_gradients_of_the_quality_reward():
    reward, generator = mapped_quality(torch.float64), torch.Generator().manual_seed(3)
    videos = 0.2 + 0.6 * torch.rand(2, 5, 3, 16, 16, generator=generator, dtype=torch.float64)
    direction = torch.randn(videos.shape, generator=generator, dtype=torch.float64)
    videos.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(PROMPTS[:2], videos).sum(), videos)
    with torch.no_grad():
        slopes = [reward(PROMPTS[:2], videos + sign * 1e-5 * direction).sum() for sign in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx(float(slopes[0] - slopes[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("fill", [0.0, 1.0, "noise", 0.5])
@pytest.mark.parametrize("plan", [*PLANS, None])
def test_rewards_and_gradients_are_finite_on_odd_videos(plan, fill):
    """None: of the quality reward."""
    videos = torch.rand(2, 5, 3, 16, 16) if fill == "noise" else torch.full((2, 5, 3, 16, 16), fill)
    videos.requires_grad_()
    settings = [OTAttention(plan=plan, fusion=fusion, floor=floor) for fusion, floor in FUSED] if plan else []
    rewards = [OTSemanticReward(build("tiny_vtm"), attention) for attention in settings]
    for reward in rewards or [mapped_quality()]:
        values = reward(PROMPTS[:2], videos)
        (gradient,) = torch.autograd.grad(values.sum(), videos)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_quality_credits_are_the_divergence():
    videos = torch.rand(3, 5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    encoder = build("tiny_vtm", torch.float64)
    bank = torch.nn.functional.normalize(torch.randn(30, 10, dtype=torch.float64), dim=1)
    divergence = BankDivergence(bank, blur=0.5, tolerance=1e-9)
    reward = OTQualityReward(encoder, bank=divergence, cosine_weight=0.0, divergence_weight=2.0)
    x = videos.double().requires_grad_()
    values = reward(PROMPTS, x)
    whole = divergence(encoder.encode_video(x).pooled)
    torch.testing.assert_close(values.mean(), -2 * whole)
    (ours,), (theirs,) = torch.autograd.grad(values.sum(), x), torch.autograd.grad(-6 * whole, x)
    torch.testing.assert_close(ours, theirs)
