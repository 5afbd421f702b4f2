"""Rules that one family needs: LTX-2, EasyAnimate, Latte, Cosmos, AnyFlow, Allegro and CogVideoX-5B's solver."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    Cosmos2TextToImagePipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from policy.test_replay_parity import PROMPTS, adapted
from tiny_pipelines import BUILD, CALLS, GUIDANCE, quiet

from pisces_rl.policy import PolicyError, Rollout, VideoPolicy, add_lora, default_lora_config, lora_parameters
from pisces_rl.policy.schedule.scheduler import training_scheduler


def policy_of(family: str, guided: bool = True, **settings) -> VideoPolicy:
    call = CALLS[family] | GUIDANCE[family][0 if guided else 1]
    return VideoPolicy(adapted(family), **dict(num_inference_steps=4, pipeline_kwargs=call) | settings)


def inputs_of(denoiser, run) -> list[dict]:
    """Return the keyword tensors of each call of the denoiser's first block during `run`."""
    seen = []
    block = denoiser.transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("guided", [True, False])
def test_the_audio_of_ltx2_is_reproduced_with_the_video(guided):
    """A window in the middle: replay skips the steps before it, but the denoiser sees the audio of the rollout."""
    policy = policy_of("ltx2", guided, num_inference_steps=5)
    denoiser = policy.denoiser["transformer"]
    found = []

    def sample():
        found.append(policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[2, 3], output_type="latent"))

    sampled = inputs_of(denoiser, sample)
    (rollout,) = found
    assert sorted(rollout.followed) == [(1, 2), (1, 3)] and all(len(v) == 2 for v in rollout.followed.values())
    replayed = inputs_of(denoiser, lambda: policy.replay(rollout, [0, 1], lambda step: None, grad=False))
    calls = len(sampled) // 5
    assert calls == (3 if guided else 1) and len(replayed) == 2 * calls
    for then, now in zip(sampled[2 * calls : 4 * calls], replayed, strict=True):
        assert torch.equal(then["hidden_states"], now["hidden_states"])
        assert torch.equal(then["audio_hidden_states"], now["audio_hidden_states"])

    lost = Rollout(**vars(rollout) | {"followed": {k: v + 0.5 for k, v in rollout.followed.items()}})
    errors = []
    policy.replay(
        lost, [0, 1], lambda s: errors.append((s.log_prob - rollout.log_probs[:, s.index - 2]).abs().max()), grad=False
    )
    assert min(errors) > 1e-4, "the audio plays no part in the video's log-probs, so this test shows nothing"


def test_audio_that_is_not_reproduced_is_refused():
    policy = policy_of("ltx2")
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 1], output_type="latent")
    rollout.followed[1, 0] += 1
    with pytest.raises(PolicyError, match="not reproducible from its generators"):
        policy.replay(rollout, [0, 1], lambda step: None, grad=False)


def test_the_audio_is_cut_and_joined_with_its_videos():
    policy = policy_of("ltx2")
    parts = [
        policy.sample([p], noise_seeds=[i], step_seeds=[i + 5], steps=[1, 2], output_type="latent")
        for i, p in enumerate(PROMPTS)
    ]
    joined = Rollout.cat(parts)
    values = {}
    policy.replay(joined, [1, 0], lambda s: values.__setitem__(s.index, s.log_prob), grad=False)
    for k, index in enumerate(joined.steps):
        torch.testing.assert_close(values[index], joined.log_probs[[1, 0], k], rtol=1e-5, atol=1e-5)


def test_audio_modules_of_ltx2_are_not_adapted():
    names = lora_parameters(dict(policy_of("ltx2").denoiser.items()))
    assert not [n for n in names if ".audio_attn" in n or ".audio_ff" in n or "video_to_audio" in n]
    assert [n for n in names if "audio_to_video_attn" in n] and [n for n in names if ".ff.net" in n]


def test_text_outputs_of_the_last_block_are_not_adapted():
    names = lora_parameters(dict(policy_of("easyanimate").denoiser.items()))
    for part in ("to_add_out", "txt_ff", "add_q_proj"):
        blocks = {n.split("transformer_blocks.")[1][0] for n in names if part in n}
        assert blocks == {"0"}, part
    assert {n.split("transformer_blocks.")[1][0] for n in names if "add_k_proj" in n} == {"0", "1"}


def test_latte_refuses_prompts_of_different_lengths():
    """A single prompt is cut to its length; in a batch it is padded, and nothing masks the padding."""
    call = CALLS["latte"] | {"mask_feature": True}
    policy = VideoPolicy(adapted("latte"), num_inference_steps=4, pipeline_kwargs=call)
    with pytest.raises(PolicyError, match="depend on the other prompts.*mask_feature=False"):
        policy.sample(["a fish", "ox"], noise_seeds=[1, 2])
    policy.sample(["a fish", "a bird"], noise_seeds=[1, 2])


def test_edm_schedules_get_the_ancestral_kernel():
    assert VideoPolicy(quiet(BUILD["cosmos"]())).transition.kernel.__name__ == "ancestral"
    with pytest.raises(PolicyError, match="'flow_sde' does not fit .*ancestral"):
        policy_of("cosmos", transition="flow_sde")
    assert isinstance(training_scheduler(EDMDPMSolverMultistepScheduler()), EDMEulerScheduler)


def test_the_last_step_of_cosmos_as_it_ships_moves_nothing():
    """Its last two sigmas are equal (final_sigmas_type="sigma_min"): the step before the last ends the sampling."""
    pipe = quiet(BUILD["cosmos"](scheduler={"final_sigmas_type": "sigma_min"}))
    add_lora({"transformer": pipe.transformer}, default_lora_config(4))
    policy = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS["cosmos"])
    rollout = policy.sample(PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0, 1, 2])
    errors = []
    policy.replay(rollout, [0, 1], lambda s: errors.append((s.log_prob - rollout.log_probs[:, s.index]).abs().max()))
    assert max(errors) == 0


def test_cosmos2_is_refused():
    """It gives sigmas up to 80 to FlowMatchEulerDiscreteScheduler: no (1 - s) x0 + s e."""
    components = dict(BUILD["cosmos"]().components)
    components["vae"] = BUILD["wan"]().vae
    components["scheduler"] = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    policy = VideoPolicy(
        quiet(Cosmos2TextToImagePipeline(**components)),
        num_inference_steps=4,
        pipeline_kwargs={"height": 32, "width": 32, "max_sequence_length": 16},
    )
    with pytest.raises(PolicyError, match=r"sigmas up to 80.*lies in \[0, 1\]"):
        policy.sample(["a"], noise_seeds=[0])


def test_the_anyflow_scheduler_is_refused():
    with pytest.raises(PolicyError, match="no transition fits it"):
        training_scheduler(FlowMapEulerDiscreteScheduler())


def test_solvers_that_ship_keep_their_schedule():
    cog = training_scheduler(BUILD["cogvideox_dpm"]().scheduler)
    assert isinstance(BUILD["cogvideox_dpm"]().scheduler, CogVideoXDPMScheduler)
    assert type(cog) is CogVideoXDDIMScheduler
    shipped = BUILD["cogvideox_dpm"]().scheduler
    assert torch.equal(cog.alphas_cumprod, shipped.alphas_cumprod) and cog.alphas_cumprod[-1] == 0
    cog.set_timesteps(7), shipped.set_timesteps(7)
    assert torch.equal(cog.timesteps, shipped.timesteps)

    allegro = EulerAncestralDiscreteScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    ours = training_scheduler(allegro)
    assert torch.equal(ours.alphas_cumprod, allegro.alphas_cumprod)
    ours.set_timesteps(4), allegro.set_timesteps(4)
    assert ours.timesteps.tolist() == allegro.timesteps.tolist()


def test_a_checkpointed_decoder_leaves_no_cache_behind():
    """EasyAnimate's decoder caches frames between its parts: a checkpoint that stops early would leave some behind."""
    policy = policy_of("easyanimate", num_inference_steps=3)
    before = policy.sample(PROMPTS, noise_seeds=[1, 2]).videos
    videos = policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2], checkpoint_decoder=True)
    videos.square().mean().backward()
    torch.testing.assert_close(policy.sample(PROMPTS, noise_seeds=[1, 2]).videos, before)
