"""Gradients through the last steps and the decoder: values, reach, and finite differences, on every family."""

import pytest
import torch
from policy.adapted import give_adapter
from policy.test_replay_parity import PROMPTS, adapted, seeded
from tiny_pipelines import BUILD, CALLS, EXPERTS, FLOW, GUIDANCE, REFUSES, often, quiet

from pisces_rl import load_pipeline
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


def all_reached(family: str, parameters: dict, gradients: list, steps) -> bool:
    """Whether the adapters of the denoisers that these steps call have gradients, and no other."""
    called = {EXPERTS[family][step] for step in steps} if family in EXPERTS else None
    return all(
        (g is not None and bool(g.abs().sum() > 0)) == (called is None or name.split(".")[0] in called)
        for name, g in zip(parameters, gradients, strict=True)
    )


@pytest.mark.parametrize("family", often(DIFFERENTIABLE))
def test_videos_are_the_samples_and_gradients_reach_every_adapter(family):
    policy, parameters = build(family, guided=True)
    expected = policy.sample(PROMPTS, **seeded(family)).videos
    before = dict(vars(policy.pipeline.vae))
    results = {}
    for last_steps, checkpointed in ((1, False), (1, True), (2, True)):
        videos = policy.sample_with_gradients(
            PROMPTS, **seeded(family), last_steps=last_steps, checkpoint_decoder=checkpointed
        )
        torch.testing.assert_close(videos.detach(), expected, rtol=0, atol=1e-5)
        results[last_steps, checkpointed] = gradients(parameters, videos.square().mean())
        steps = range(STEPS - last_steps, STEPS)
        assert all_reached(family, parameters, results[last_steps, checkpointed], steps)
    one, again, two = ([g for g in results[key] if g is not None] for key in ((1, False), (1, True), (2, True)))
    for plain, checkpointed in zip(one, again, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-8)
    assert len(two) > len(one) or any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(one, two, strict=True))
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


@pytest.mark.parametrize(
    "family, last_steps",
    [
        ("tiny-wan", STEPS),
        ("tiny-wan", 1),
        ("cogvideox", STEPS),
        ("cogvideox", 1),
        ("ltx", STEPS),
        ("ltx", 1),
        ("mochi", STEPS),
        ("mochi", 1),
        ("hunyuan", STEPS),
        ("hunyuan", 1),
        ("animatediff", STEPS),
    ],
)
def test_the_gradient_in_a_random_direction_is_the_finite_difference(family, last_steps):
    """The reward is how far a video goes where the direction takes it, so that the difference stands out of the noise.

    What enters the last step is held constant by giving its latents (`renoise`).
    """
    policy, parameters = trained_wan() if family == "tiny-wan" else build(family)
    how = {"last_steps": last_steps}
    if last_steps == 1:
        how["renoise"] = policy.final_latents(PROMPTS, noise_seeds=[1, 2]), (5, 6)
    # The step of the finite difference: above fp32's rounding, and small enough to be linear.
    size = {STEPS: 0.4, 1: 1.6}[last_steps] if family == "tiny-wan" else 0.05
    generator, start = torch.Generator().manual_seed(1), [p.detach().clone() for p in parameters.values()]
    direction = [torch.randn(p.shape, generator=generator) for p in parameters.values()]
    norm = torch.stack([d.norm() for d in direction]).norm()

    def videos(at: float = 0.0, checkpointed: bool = False) -> torch.Tensor:
        for parameter, value, d in zip(parameters.values(), start, direction, strict=True):
            parameter.data = value + at * d / norm
        return policy.sample_with_gradients(
            PROMPTS, noise_seeds=[1, 2], checkpoint_decoder=checkpointed, **how
        ).double()

    moved = (videos(size) - videos(-size)).detach()
    for checkpointed in (False, True):
        if checkpointed:
            policy.activation_checkpointing_enable()
        gradient = gradients(parameters, (videos(checkpointed=checkpointed) * moved / moved.norm()).sum())
        slope = sum((g.double() * d).sum() for g, d in zip(gradient, direction, strict=True)) / norm
        assert slope.item() == pytest.approx(moved.norm().item() / (2 * size), rel=1.5e-3)


def trained_wan() -> tuple[VideoPolicy, dict]:
    """The embedded model: videos of the random one hardly move."""
    pipe = quiet(load_pipeline("tiny-wan", torch.float32))
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 24}
    policy = VideoPolicy(pipe, num_inference_steps=STEPS, pipeline_kwargs=call)
    return policy, give_adapter(dict(policy.denoiser.items()), std=0.05)[0]


@pytest.mark.parametrize("family", often(DIFFERENTIABLE))
def test_a_jump_decodes_the_one_step_prediction(family):
    policy, parameters = build(family)
    last = policy.sample_with_gradients(PROMPTS, **seeded(family), jump_at=STEPS - 1)
    if family in FLOW:  # the last step's own result is its prediction
        torch.testing.assert_close(last, policy.sample(PROMPTS, **seeded(family)).videos, rtol=0, atol=1e-5)
    first = policy.sample_with_gradients(PROMPTS, **seeded(family), jump_at=0)
    assert not torch.allclose(first, last)
    assert all_reached(family, parameters, gradients(parameters, first.square().mean()), [0])


@pytest.mark.parametrize("family", often(f for f in DIFFERENTIABLE if (f, "a later start") not in REFUSES))
def test_the_last_step_begins_from_renoised_latents(family):
    policy, parameters = build(family)
    final = policy.final_latents(PROMPTS, **seeded(family))
    assert not final.requires_grad
    a, b, again = (
        policy.sample_with_gradients(PROMPTS, **seeded(family), renoise=(final, seeds))
        for seeds in ((5, 6), (7, 6), (5, 6))
    )
    torch.testing.assert_close(a, again, rtol=0, atol=0)
    assert not torch.allclose(a[0], b[0]) and torch.allclose(a[1], b[1], atol=1e-5)
    assert all_reached(family, parameters, gradients(parameters, a.square().mean()), [STEPS - 1])


@pytest.mark.parametrize("family", often(f for f in DIFFERENTIABLE if (f, "a part of the frames") not in REFUSES))
def test_a_part_of_the_frames(family):
    policy, parameters = build(family)
    whole = policy.sample(PROMPTS, **seeded(family)).videos
    videos = policy.sample_with_gradients(PROMPTS, **seeded(family), part=DecodedPart(1, seed=3))
    assert all_reached(family, parameters, gradients(parameters, videos.square().mean()), [STEPS - 1])
    if family in BY_FRAME:
        torch.testing.assert_close(videos.detach(), whole, rtol=1e-4, atol=1e-5)
        videos = policy.sample_with_gradients(PROMPTS, **seeded(family), part=DecodedPart(1, seed=3))
        (of_pixels,) = torch.autograd.grad(videos.square().sum(), videos)
        chosen = DecodedPart(1, seed=3).of(whole.shape[1])
        outside = [f for f in range(whole.shape[1]) if not chosen.start <= f < chosen.stop]
        assert all(g is None or not g.any() for g in gradients(parameters, videos[:, outside].sum()))
    else:
        assert videos.shape[1] < whole.shape[1] or whole.shape[1] == 1


def test_bad_arguments():
    policy, _ = build("wan")
    for wrong, text in (
        (dict(last_steps=0), "last_steps=0"),
        (dict(last_steps=STEPS + 1), f"last_steps={STEPS + 1}"),
        (dict(jump_at=STEPS), f"jump_at={STEPS}"),
        (dict(last_steps=2, renoise=(torch.zeros(2, 1), (1, 2))), "renoise"),
    ):
        with pytest.raises(ValueError, match=text):
            policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], **wrong)
