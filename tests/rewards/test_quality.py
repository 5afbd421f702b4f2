"""The quality reward at its edges: what it is given, and where its encoder and its bank lie."""

import pytest
import torch
from tiny_encoders import build

from pisces_rl.ot import BankDivergence
from pisces_rl.rewards import OTQualityReward, RewardPanel, load_reward

PROMPTS = ["a red circle", "a green square"]
VIDEOS = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("prompts", "videos", "error", "message"),
    [
        ("a red circle", VIDEOS, TypeError, "prompts: expected a list of strings, one per video, got 'a red circle'"),
        ("ab", VIDEOS, TypeError, "got 'ab'"),  # as many letters as videos
        (None, VIDEOS, TypeError, "prompts: expected a list of strings, one per video, got None"),
        (["a", 3], VIDEOS, TypeError, "got 3 as prompt 1"),
        (PROMPTS, VIDEOS.numpy(), TypeError, "videos: expected a tensor .* got ndarray; convert .* torch.from_numpy"),
        (PROMPTS, list(VIDEOS), TypeError, "got list; .* torch.stack"),
        (PROMPTS[:1], VIDEOS, ValueError, "prompts: expected one per video, got 1 prompts for 2 videos"),
        (PROMPTS, VIDEOS[:1], ValueError, "got 2 prompts for 1 videos"),
        (PROMPTS, VIDEOS[0], ValueError, r"videos: expected a tensor \(B, F, 3, H, W\)"),
        (PROMPTS, VIDEOS.movedim(2, -1), ValueError, r"got \(2, 5, 16, 16, 3\)"),
        ([], VIDEOS[:0], ValueError, "with no empty axis"),
    ],
)
def test_what_is_not_prompts_and_videos_is_refused(prompts, videos, error, message):
    with pytest.raises(error, match=message):
        OTQualityReward(build("tiny_vtm"))(prompts, videos)


def test_prompts_may_be_any_sequence_of_strings():
    reward = OTQualityReward(build("tiny_vtm"))
    assert torch.equal(reward(tuple(PROMPTS), VIDEOS), reward(PROMPTS, VIDEOS))


def test_settings_without_effect_are_refused():
    encoder, bank = build("tiny_vtm"), torch.rand(8, 10)
    with pytest.raises(ValueError, match="bank: it has no effect without a divergence_weight"):
        OTQualityReward(encoder, bank=bank)
    with pytest.raises(ValueError, match="blur: it has no effect without a divergence_weight"):
        OTQualityReward(encoder, blur=0.1)
    with pytest.raises(ValueError, match="blur: the bank, a BankDivergence, already sets it"):
        OTQualityReward(encoder, bank=BankDivergence(bank, blur=0.2), divergence_weight=1.0, blur=0.1)
    with pytest.raises(ValueError, match="solver: the bank, a BankDivergence, already sets it"):
        OTQualityReward(encoder, bank=BankDivergence(bank, blur=0.2), divergence_weight=1.0, solver="native")
    with pytest.raises(ValueError, match="solver: it has no effect without a divergence_weight"):
        OTQualityReward(encoder, solver="geomloss")


# --- an encoder that offloads ---


@pytest.fixture
def offloading(monkeypatch):
    """An encoder that offloads, and a list of the devices it is sent to; it stays on the CPU."""
    encoder, places = build("tiny_vtm"), []
    encoder.offload = "cuda"
    monkeypatch.setattr(encoder, "to", lambda place: places.append(place) or encoder)
    return encoder, places


def test_weights_go_back_after_a_call_without_a_graph(offloading):
    encoder, places = offloading
    OTQualityReward(encoder)(PROMPTS, VIDEOS)
    assert places == ["cuda", "cuda", "cpu"]


def test_weights_stay_for_the_callers_backward(offloading):
    encoder, places = offloading
    OTQualityReward(encoder)(PROMPTS, VIDEOS.clone().requires_grad_()).sum().backward()
    assert places == ["cuda", "cuda"]


def test_weights_go_back_after_a_panels_backward(offloading):
    encoder, places = offloading
    reward = OTQualityReward(encoder)

    def watched(prompts, videos):
        values = reward(prompts, videos)
        values.register_hook(lambda gradient: places.append("backward"))
        return values

    watched.differentiable = True
    RewardPanel([watched]).with_gradients(PROMPTS, VIDEOS, {})
    assert places == ["cuda", "cuda", "backward", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_rewards_are_those_of_the_cpu():
    prompts, videos = ["a red circle moving left"] * 2, torch.rand(2, 17, 3, 64, 64)
    options = {"ot_quality": dict(divergence_weight=0.1), "ot_semantic": {}}
    for name, settings in options.items():
        own = load_reward(name, **settings, offload="cuda")
        plain = load_reward(name, **settings)
        plain.encoder.to("cpu")
        assert own.encoder is not plain.encoder and own.encoder.device.type == "cpu"
        with torch.no_grad():
            torch.testing.assert_close(own(prompts, videos), plain(prompts, videos), rtol=2e-3, atol=1e-4)
        assert own.encoder.device.type == "cpu"
        slopes = []
        for reward in (own, plain):
            x = videos.clone().requires_grad_()
            slopes.append(torch.autograd.grad(reward(prompts, x).sum(), x)[0])
        assert torch.nn.functional.cosine_similarity(*(slope.flatten() for slope in slopes), dim=0) > 0.99
        _, (gradient,) = RewardPanel([own]).with_gradients(prompts, videos, {})
        assert gradient.isfinite().all() and own.encoder.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bank_may_lie_on_another_device_than_the_encoder():
    encoder, divergence = build("tiny_vtm"), BankDivergence(torch.rand(8, 10), blur=0.3)
    reward = OTQualityReward(encoder, bank=divergence, divergence_weight=1.0)
    expected = reward(PROMPTS, VIDEOS)
    encoder.to("cuda")
    x = VIDEOS.to("cuda").requires_grad_()
    values = reward(PROMPTS, x)
    assert torch.autograd.grad(values.sum(), x)[0].isfinite().all()
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-3, atol=1e-4)
