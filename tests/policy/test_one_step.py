"""Predictions at one step, on every family."""

import pytest
import torch
from policy.test_backprop import all_reached
from policy.test_latents import build
from policy.test_replay_parity import PROMPTS, seeded
from tiny_pipelines import BUILD, CONDITIONS, FLOW, GUIDANCE, REFUSES, often

from pisces_rl.policy import PolicyError, Prediction, Rollout, lora_parameters


def predict(policy, *, noise_seeds, clean=None, conditions=None, **settings) -> Prediction:
    """Of two given videos."""
    videos = Rollout(PROMPTS, [7, 8], None, [], conditions=conditions or {}, clean=clean)
    return policy.predict(videos, [0, 1], noise_seeds=noise_seeds, **settings)


STARTING = [family for family in BUILD if (family, "a later start") not in REFUSES]


@pytest.mark.parametrize("family, message", [(f, m) for (f, what), m in REFUSES.items() if what == "a later start"])
def test_families_that_cannot_start_later_say_so(family, message):
    policy = build(family)
    first = predict(policy, noise_seeds=[1, 2], step=0)
    with pytest.raises(PolicyError, match=message):
        predict(policy, noise_seeds=[1, 2], step=1, state=first.following)


@pytest.mark.parametrize("family", often(STARTING))
def test_predictions_along_the_trajectory_are_the_sampler_s(family):
    policy = build(family)
    final = policy.final_latents(PROMPTS, **seeded(family))
    state = None
    for step in range(3):
        found = predict(policy, **seeded(family), step=step, state=state)
        if step:
            torch.testing.assert_close(found.state, state.float(), rtol=1e-2, atol=1e-2)  # Mochi rounds its latents
        state = found.following
    torch.testing.assert_close(state, final.float(), rtol=1e-2, atol=1e-2)
    if family in FLOW:
        torch.testing.assert_close(found.clean, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", often(STARTING))
def test_noised_states_gradients_and_another_grid(family):
    policy = build(family)
    parameters = lora_parameters(dict(policy.denoiser.items()))
    clean = policy.final_latents(PROMPTS, **seeded(family))
    a, b, c = (
        predict(policy, noise_seeds=seeds, conditions=CONDITIONS[family], step=4, clean=clean, num_inference_steps=8)
        for seeds in ([1, 2], [1, 2], [3, 2])
    )
    rows = len(clean) // 2
    torch.testing.assert_close(a.state, b.state)
    assert not torch.allclose(a.state[:rows], c.state[:rows]) and torch.allclose(a.state[rows:], c.state[rows:])
    for step in (0, 2):
        found = predict(policy, **seeded(family), step=step, clean=clean, grad=True)
        gradient = torch.autograd.grad(found.clean.square().mean(), list(parameters.values()), allow_unused=True)
        assert all_reached(family, parameters, gradient, [step])
    assert not predict(policy, **seeded(family), step=2, clean=clean).clean.requires_grad


@pytest.mark.parametrize("family", often(STARTING))
def test_guidance_for_this_once(family):
    policy = build(family)
    clean = policy.final_latents(PROMPTS, **seeded(family))
    plain = predict(policy, **seeded(family), step=2, clean=clean)
    guided = predict(policy, **seeded(family), step=2, clean=clean, **GUIDANCE[family][0])
    torch.testing.assert_close(guided.state, plain.state)
    assert not torch.allclose(guided.clean, plain.clean, atol=1e-6) or family == "hunyuan"  # it is embedded
    again = predict(policy, **seeded(family), step=2, clean=clean)
    torch.testing.assert_close(again.clean, plain.clean)


def test_bad_arguments():
    policy = build("wan")
    clean = policy.final_latents(PROMPTS, noise_seeds=[1, 2])
    with pytest.raises(ValueError, match="step=3 must be from 0 to"):
        predict(policy, noise_seeds=[1, 2], step=3, clean=clean)
    with pytest.raises(ValueError, match="no clean latents"):
        predict(policy, noise_seeds=[1, 2], step=1)


@pytest.mark.parametrize("family", STARTING)
def test_a_rollout_keeps_what_its_videos_are_decoded_from(family):
    policy, seeds = build(family), seeded(family)
    rollout = policy.sample(PROMPTS, **seeds)
    torch.testing.assert_close(rollout.clean, policy.final_latents(PROMPTS, **seeds).float(), rtol=0, atol=0)
    whole = policy.predict(rollout, [0, 1], noise_seeds=[5, 6], step=2)
    part = policy.predict(rollout, [1], noise_seeds=[6], step=2)
    n = len(part.state)
    torch.testing.assert_close(part.state, whole.state[-n:])
    torch.testing.assert_close(part.clean, whole.clean[-n:], rtol=1e-3, atol=1e-4)
