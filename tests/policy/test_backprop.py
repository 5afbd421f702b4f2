"""Gradients through the last steps and the decoder: values, reach, and finite differences, on every family."""

import pytest
import torch
from policy.test_replay_parity import PROMPTS, adapted
from tiny_pipelines import BUILD, CALLS, FLOW, GUIDANCE, REFUSES

from pisces_rl.policy import DecodedPart, PolicyError, VideoPolicy, lora_parameters

STEPS = 3
DIFFERENTIABLE = [family for family in BUILD if (family, "backpropagation") not in REFUSES]
BY_FRAME = ("animatediff", "t2v_sd", "latte")  # families whose decoder takes frames one by one


def build(family: str, guided: bool = False) -> tuple[VideoPolicy, dict]:
    call = CALLS[family] | GUIDANCE[family][0 if guided else 1]
    policy = VideoPolicy(adapted(family), num_inference_steps=STEPS, pipeline_kwargs=call)
    for denoiser in policy.denoiser.values():
        if denoiser._supports_gradient_checkpointing:
            denoiser.disable_gradient_checkpointing()
    return policy, lora_parameters(dict(policy.denoiser.items()))


def gradients(parameters: dict, loss) -> list:
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)


@pytest.mark.parametrize("family", DIFFERENTIABLE)
def test_videos_are_the_samples_and_gradients_reach_every_adapter(family):
    policy, parameters = build(family, guided=True)
    expected = policy.sample(PROMPTS, noise_seeds=[1, 2]).videos
    before = dict(vars(policy.pipeline.vae))
    results = {}
    for last_steps, checkpointed in ((1, False), (1, True), (2, True)):
        videos = policy.sample_with_gradients(
            PROMPTS, noise_seeds=[1, 2], last_steps=last_steps, checkpoint_decoder=checkpointed
        )
        torch.testing.assert_close(videos.detach(), expected, rtol=0, atol=1e-5)
        results[last_steps, checkpointed] = gradients(parameters, videos.square().mean())
        assert all(g is not None and g.abs().sum() > 0 for g in results[last_steps, checkpointed])
    for plain, checkpointed in zip(results[1, False], results[1, True], strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-8)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(results[1, True], results[2, True], strict=True))
    assert vars(policy.pipeline.vae).keys() == before.keys() and torch.is_grad_enabled()


def refusals(what: str) -> list:
    return [(family, message) for (family, refused), message in REFUSES.items() if refused == what]


@pytest.mark.parametrize("family, message", refusals("backpropagation"))
def test_families_without_backpropagation_say_so(family, message):
    policy, _ = build(family)
    with pytest.raises(PolicyError, match=message):
        policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2])
    assert "decode" not in vars(policy.pipeline.vae) and torch.is_grad_enabled()


@pytest.mark.parametrize("family, message", refusals("a later start"))
def test_families_that_cannot_start_later_say_so(family, message):
    policy, _ = build(family)
    final = policy.final_latents(PROMPTS, noise_seeds=[1, 2])
    with pytest.raises(PolicyError, match=message):
        policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], renoise=(final, (5, 6)))


@pytest.mark.parametrize("family, message", refusals("a part of the frames"))
def test_families_that_decode_no_part_say_so(family, message):
    policy, _ = build(family)
    with pytest.raises(PolicyError, match=message):
        policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], part=DecodedPart(1, seed=3))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["wan", "animatediff"])
def test_the_gradient_is_the_finite_difference(family, checkpointing):
    """With all steps in the graph nothing is held constant, so the difference quotient needs no care."""
    policy, parameters = build(family)
    if checkpointing:
        policy.activation_checkpointing_enable()
    weight = torch.randn(16, 3, 1, 1, generator=torch.Generator().manual_seed(0))

    def value() -> torch.Tensor:
        videos = policy.sample_with_gradients(
            PROMPTS, noise_seeds=[1, 2], last_steps=STEPS, checkpoint_decoder=checkpointing
        )
        return (videos * weight[: videos.shape[1]]).double().mean((-1, -2)).sum()

    gradient = gradients(parameters, value())
    norm = torch.stack([g.norm() for g in gradient]).norm()
    ends, size = [], 2e-2
    for sign in (1, -2):
        for parameter, g in zip(parameters.values(), gradient, strict=True):
            parameter.data += sign * size * g / norm
        ends.append(value().item())
    for parameter, g in zip(parameters.values(), gradient, strict=True):
        parameter.data += size * g / norm
    assert norm.item() == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=2e-2)


@pytest.mark.parametrize("family", DIFFERENTIABLE)
def test_a_jump_decodes_the_one_step_prediction(family):
    policy, parameters = build(family)
    last = policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], jump_at=STEPS - 1)
    if family in FLOW:  # the last step's own result is its prediction
        torch.testing.assert_close(last, policy.sample(PROMPTS, noise_seeds=[1, 2]).videos, rtol=0, atol=1e-5)
    first = policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], jump_at=0)
    assert not torch.allclose(first, last)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(parameters, first.square().mean()))


@pytest.mark.parametrize("family", [f for f in DIFFERENTIABLE if (f, "a later start") not in REFUSES])
def test_the_last_step_begins_from_renoised_latents(family):
    policy, parameters = build(family)
    final = policy.final_latents(PROMPTS, noise_seeds=[1, 2])
    assert not final.requires_grad
    a, b, again = (
        policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], renoise=(final, seeds))
        for seeds in ((5, 6), (7, 6), (5, 6))
    )
    torch.testing.assert_close(a, again, rtol=0, atol=0)
    assert not torch.allclose(a[0], b[0]) and torch.allclose(a[1], b[1], atol=1e-5)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(parameters, a.square().mean()))


@pytest.mark.parametrize("family", [f for f in DIFFERENTIABLE if (f, "a part of the frames") not in REFUSES])
def test_a_part_of_the_frames(family):
    policy, parameters = build(family)
    whole = policy.sample(PROMPTS, noise_seeds=[1, 2]).videos
    videos = policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], part=DecodedPart(1, seed=3))
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(parameters, videos.square().mean()))
    if family in BY_FRAME:
        torch.testing.assert_close(videos.detach(), whole, rtol=1e-4, atol=1e-5)
        videos = policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], part=DecodedPart(1, seed=3))
        (of_pixels,) = torch.autograd.grad(videos.square().sum(), videos)
        chosen = DecodedPart(1, seed=3).of(whole.shape[1])
        outside = [f for f in range(whole.shape[1]) if not chosen.start <= f < chosen.stop]
        assert all(g is None or not g.any() for g in gradients(parameters, videos[:, outside].sum()))
    else:
        assert videos.shape[1] < whole.shape[1] or whole.shape[1] == 1


def test_bad_arguments():
    policy, _ = build("wan")
    for wrong, text in (
        (dict(last_steps=0), "last_steps=0"), (dict(last_steps=STEPS + 1), f"last_steps={STEPS + 1}"),
        (dict(jump_at=STEPS), f"jump_at={STEPS}"),
        (dict(last_steps=2, renoise=(torch.zeros(2, 1), (1, 2))), "renoise"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], **wrong)
