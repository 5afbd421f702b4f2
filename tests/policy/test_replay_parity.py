"""Replayed log-probs equal the sampling pass's: every family, every transition that fits, guidance on and off."""

import functools
import math

import diffusers
import pytest
import torch
from policy.adapted import give_adapter
from tiny_pipelines import BUILD, CALLS, CONDITIONS, EDM, FLOW, GUIDANCE, OFTEN, often, quiet

from pisces_rl.policy import PolicyError, VideoPolicy, lora_parameters
from pisces_rl.policy.lora.lora_files import has_lora_loader

# No text mask: plain diffusers attends to the padding of a batch, the policy treats each prompt as alone.
FLOW_TRANSITIONS = ("flow_sde", "flow_sde_linear", "dance_sde", "cps")
FITTING = {family: ("ddim",) for family in BUILD}
FITTING |= dict.fromkeys(FLOW, FLOW_TRANSITIONS) | dict.fromkeys(EDM, ("ancestral",))
HOW = {
    "guided-plain": (True, False),
    "guided-checkpointed": (True, True),
    "unguided-plain": (False, False),
    "unguided-checkpointed": (False, True),
}
QUICK = "guided-plain", "unguided-checkpointed"  # each half of both ways


def is_quick(family: str, name: str, how: str) -> bool:
    """Every family one way. The other transitions only draw another x', so a few families are enough for them."""
    return (
        how == QUICK[0]
        and name == FITTING[family][0]
        or family in OFTEN
        and (how == QUICK[0] or how == QUICK[1] and name == FITTING[family][0])
    )


CASES = [
    pytest.param(
        family,
        name,
        guided,
        checkpointing,
        id=f"{family}-{name}-{how}",
        marks=() if is_quick(family, name, how) else pytest.mark.slow,
    )
    for family in BUILD
    for name in FITTING[family]
    for how, (guided, checkpointing) in HOW.items()
]
SLICE_TOLERANCE = {"allegro": 3e-5}  # x0^ = (x - ...) / sqrt(alpha-bar), which is 0.0064 at its first step
PROMPTS = ["a fish", "a bird in the snow"]


def seeded(family: str) -> dict:
    """Noise and conditions of the two prompts."""
    return {"noise_seeds": [1, 2], "conditions": CONDITIONS[family]}


@functools.cache
def adapted(family: str):
    """A family's tiny pipeline with a LoRA whose B is not zero."""
    pipe = quiet(BUILD[family]())
    give_adapter(dict(VideoPolicy(pipe).denoiser.items()))
    return pipe


@pytest.mark.parametrize("family, transition, guided, checkpointing", CASES)
def test_replay_equals_sampling(family, transition, guided, checkpointing, parity_results):
    pipe = adapted(family)
    call = CALLS[family] | GUIDANCE[family][0 if guided else 1]
    policy = VideoPolicy(pipe, transition=transition, num_inference_steps=4, pipeline_kwargs=call)
    if checkpointing and family == "t2v_sd":
        with pytest.warns(UserWarning, match="does not support gradient checkpointing"):
            policy.activation_checkpointing_enable()
    elif checkpointing:
        policy.activation_checkpointing_enable()
    else:
        for denoiser in policy.denoiser.values():
            if denoiser._supports_gradient_checkpointing:
                denoiser.disable_gradient_checkpointing()
    parameters = lora_parameters(dict(policy.denoiser.items()))
    for parameter in parameters.values():
        parameter.grad = None

    rollout = policy.sample(PROMPTS, **seeded(family), step_seeds=[3, 4], steps=[0, 1, 2])
    assert rollout.videos.shape[:1] + rollout.videos.shape[2:3] == (2, 3)
    assert 0 <= float(rollout.videos.min()) and float(rollout.videos.max()) <= 1
    assert rollout.log_probs.shape == (2, 3) and torch.isfinite(rollout.log_probs).all()

    errors = {"whole": 0.0, "slice": 0.0}

    def visitor(kind):
        def visit(step):
            old = rollout.log_probs[step.rows, rollout.steps.index(step.index)]
            errors[kind] = max(errors[kind], float((step.log_prob.detach() - old).abs().max()))
            step.log_prob.sum().backward()  # one step's graph at a time

        return visit

    policy.replay(rollout, [0, 1], visitor("whole"))
    reached = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters.values())
    policy.replay(rollout, [1], visitor("slice"))

    parity_results.append(
        {
            "family": family,
            "pipeline": type(pipe).__name__,
            "transition": transition,
            "guided": guided,
            "checkpointed": checkpointing,
            "whole_batch": errors["whole"],
            "slice": errors["slice"],
            "adapter_tensors": len(parameters),
            "with_gradient": reached,
            "lora_layout": "diffusers" if has_lora_loader(pipe) else "peft",
            "diffusers": diffusers.__version__,
        }
    )
    assert errors["whole"] == 0.0
    assert errors["slice"] <= SLICE_TOLERANCE.get(family, 1e-5)
    assert reached == len(parameters)


@pytest.mark.parametrize("family", often(BUILD))
def test_log_prob_is_the_gaussian_density_of_the_recorded_states(family):
    pipe = adapted(family)
    policy = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS[family])
    rollout = policy.sample(PROMPTS, **seeded(family), step_seeds=[3, 4], steps=[1])
    seen = []
    policy.replay(rollout, [0, 1], seen.append, grad=False)
    assert [row for step in seen for row in step.rows] == [0, 1]
    mean, std = torch.cat([step.mean for step in seen]), seen[0].std
    density = torch.distributions.Normal(mean, std).log_prob(rollout.states[2])
    torch.testing.assert_close(rollout.log_probs[:, 0], density.reshape(2, -1).mean(1), rtol=1e-5, atol=1e-5)
    residual = (rollout.states[2] - mean) / std
    assert float(residual.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * residual.numel()))


@pytest.mark.parametrize("family", BUILD)
def test_deterministic_sampling_is_the_unmodified_pipeline(family):
    """Without a stochastic step the policy draws what the pipeline alone draws, and leaves the pipeline unchanged.

    By itself with the schedule a policy uses, and one prompt at a time, which is all that some pipelines take.
    """
    pipe = adapted(family)
    policy = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS[family])
    scheduler = pipe.scheduler
    ours = policy.sample(PROMPTS, **seeded(family), output_type="pt").videos
    assert pipe.scheduler is scheduler and "encode_prompt" not in vars(pipe)
    call = dict(num_inference_steps=4, output_type="pt", **CALLS[family])
    own = [{name: values[i] for name, values in CONDITIONS[family].items()} for i in range(2)]
    try:
        pipe.scheduler = type(policy.scheduler).from_config(policy.scheduler.config)
        theirs = [
            pipe(
                prompt=prompt if condition else [prompt],
                generator=torch.Generator().manual_seed(seed),
                **condition,
                **call,
            )[0]
            for prompt, seed, condition in zip(PROMPTS, (1, 2), own, strict=True)
        ]
    finally:
        pipe.scheduler = scheduler
    atol = 1.01 / 255 if family == "cosmos" else 2e-4  # its guardrail hands back videos of 8 bits
    torch.testing.assert_close(ours, torch.cat(theirs).float().view_as(ours), rtol=1e-3, atol=atol)
    assert all("forward" not in vars(d) for d in policy.denoiser.values())


@pytest.mark.parametrize("family", ["wan", "kandinsky5"])  # which writes x' over x, so that a graph may lose it
def test_one_graph_equals_one_backward_per_step(family):
    pipe = adapted(family)
    policy = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS[family])
    parameters = lora_parameters(dict(policy.denoiser.items()))
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 2])

    def gradients(visit, finish=lambda: None):
        for parameter in parameters.values():
            parameter.grad = None
        policy.replay(rollout, [0, 1], visit)
        finish()
        return torch.cat([p.grad.flatten() for p in parameters.values()])

    kept = []
    stepwise = gradients(lambda step: step.log_prob.sum().backward())
    joint = gradients(lambda step: kept.append(step.log_prob.sum()), lambda: sum(kept).backward())
    torch.testing.assert_close(stepwise, joint)


def test_gradient_equals_finite_difference():
    pipe = adapted("wan")
    policy = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS["wan"])
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[1])
    policy.denoiser.double()
    pipe.text_encoder.double()
    try:
        policy.prompt_memo.memory.clear()
        parameters = list(lora_parameters(dict(policy.denoiser.items())).values())
        torch.manual_seed(0)
        direction = [torch.randn_like(p) for p in parameters]

        def total(grad):
            values = []
            policy.replay(rollout, [0, 1], lambda step: values.append(step.log_prob.sum()), grad=grad)
            return values[0]

        @torch.no_grad()
        def moved(distance):
            for p, d in zip(parameters, direction):
                p.add_(d, alpha=distance)
            value = float(total(grad=False))
            for p, d in zip(parameters, direction):
                p.sub_(d, alpha=distance)
            return value

        for parameter in parameters:
            parameter.grad = None
        total(grad=True).backward()
        slope = float(sum((p.grad * d).sum() for p, d in zip(parameters, direction)))
        h = 1e-3
        assert (moved(h) - moved(-h)) / (2 * h) == pytest.approx(slope, rel=2e-2)
    finally:
        policy.denoiser.float()
        pipe.text_encoder.float()


def test_a_sample_depends_only_on_its_seeds():
    policy = VideoPolicy(adapted("wan"), num_inference_steps=4, pipeline_kwargs=CALLS["wan"])
    both = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 1])
    alone = policy.sample(PROMPTS[1:], noise_seeds=[2], step_seeds=[4], steps=[0, 1])
    torch.testing.assert_close(both.videos[1:], alone.videos, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.log_probs[1:], alone.log_probs, rtol=1e-4, atol=1e-5)


def test_joined_rollouts_replay_like_their_parts():
    policy = VideoPolicy(adapted("t2v_sd"), num_inference_steps=3, pipeline_kwargs=CALLS["t2v_sd"])
    parts = [policy.sample([p], noise_seeds=[i], step_seeds=[i + 5], steps=[0, 1]) for i, p in enumerate(PROMPTS)]
    joined = type(parts[0]).cat(parts)
    assert joined.rows_per_video == CALLS["t2v_sd"]["num_frames"]
    values = {}
    policy.replay(joined, [1, 0], lambda s: values.__setitem__(s.index, s.log_prob.detach()), grad=False)
    for k, index in enumerate(joined.steps):
        torch.testing.assert_close(values[index], joined.log_probs[[1, 0], k], rtol=1e-5, atol=1e-5)


def test_untrained_steps_skip_the_denoiser():
    policy = VideoPolicy(adapted("wan"), num_inference_steps=4, pipeline_kwargs=CALLS["wan"] | {"guidance_scale": 1.0})
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[2])
    calls = []
    block = policy.denoiser["transformer"].blocks[0]
    handle = block.register_forward_hook(lambda *a: calls.append(1))
    policy.replay(rollout, [0, 1], lambda s: None)
    handle.remove()
    assert len(calls) == 1 and sorted(rollout.states) == [2, 3]


def test_a_replay_of_other_states_is_detected():
    policy = VideoPolicy(adapted("wan"), num_inference_steps=4, pipeline_kwargs=CALLS["wan"])
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 1])
    policy.replay(rollout, [0, 1], lambda s: None, wait=False)
    policy.check_replays()
    rollout.states[0] = rollout.states[0] + 0.5
    with pytest.raises(PolicyError, match="at step 0 the replay reached a state that differs .* by 0.5"):
        policy.replay(rollout, [0, 1], lambda s: None)
    policy.replay(rollout, [0, 1], lambda s: None, wait=False)
    policy.replay(rollout, [1], lambda s: None, wait=False)
    with pytest.raises(PolicyError, match="at step 0"):
        policy.check_replays()
    policy.check_replays()  # each is reported once


def test_an_exception_in_the_visitor_leaves_the_pipeline_usable():
    pipe = adapted("wan")
    policy = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS["wan"])
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[1])
    scheduler = pipe.scheduler

    def visit(step):
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        policy.replay(rollout, [0, 1], visit)
    assert pipe.scheduler is scheduler and torch.is_grad_enabled()
    with torch.no_grad():
        policy.replay(rollout, [0, 1], lambda s: None)
        assert not torch.is_grad_enabled()
