"""What cannot be a policy says which rule it breaks and what to do; conversions of schedulers."""

import copy

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from tiny_pipelines import BUILD, CALLS, GUIDANCE, quiet
from tiny_pipelines.since_wan22 import skyreels_parts

from pisces_rl.policy import PolicyError, VideoPolicy
from pisces_rl.policy.schedule.scheduler import training_scheduler
from pisces_rl.policy.schedule.schedules import schedule_class


@pytest.fixture(scope="module")
def wan():
    return quiet(BUILD["wan"]())


def policy(pipe, **settings):
    return VideoPolicy(pipe, **dict(num_inference_steps=4, pipeline_kwargs=CALLS["wan"]) | settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"transition": "ddim"}, "'ddim' does not fit .*use one of .*flow_sde"),
        ({"transition": "euler"}, "'euler' does not fit"),
        ({"num_inference_steps": 1, "sde_window_size": 1}, r"sde_window_range=\[0, 0\] must satisfy"),
        ({"sde_window_range": (0, 4)}, r"sde_window_range=\[0, 4\].*<= 3"),
        ({"sde_window_size": 9}, "sde_window_size=9 must be between 1 and 3"),
        ({"pipeline_kwargs": {"hieght": 16}}, "takes no argument 'hieght'"),
        ({"pipeline_kwargs": {"latents": torch.zeros(1)}}, "'latents' would change"),
        ({"pipeline_kwargs": {"num_videos_per_prompt": 2}}, "num_videos_per_prompt=2"),
    ],
)
def test_settings_that_do_not_fit(wan, settings, message):
    with pytest.raises(PolicyError, match=message):
        policy(wan, **settings)


def test_one_step_has_nothing_to_draw(wan):
    with pytest.raises(PolicyError, match="num_inference_steps=1: GRPO needs at least 2"):
        policy(wan, num_inference_steps=1).draw_window(0)


def test_clipping_and_stochastic_schedulers_are_refused():
    with pytest.raises(PolicyError, match="clip_sample=True.*clip_sample=False"):
        training_scheduler(DDIMScheduler(clip_sample=True))
    with pytest.raises(PolicyError, match="thresholding=True"):
        training_scheduler(DDIMScheduler(clip_sample=False, thresholding=True))
    with pytest.raises(PolicyError, match="stochastic_sampling"):
        training_scheduler(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def test_multistep_schedulers_become_first_order():
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    ours = training_scheduler(unipc)
    assert schedule_class(ours).family == "flow" and ours.config.flow_shift == 5.0
    assert schedule_class(training_scheduler(DPMSolverMultistepScheduler())).family == "ddim"
    assert isinstance(training_scheduler(CogVideoXDPMScheduler()), CogVideoXDDIMScheduler)


def broken(step):
    """A Wan pipeline class whose loop does something else with the scheduler."""
    from diffusers import WanPipeline

    class Broken(WanPipeline):
        def __call__(self, prompt, generator=None, output_type="pt", num_inference_steps=4, **kwargs):
            return step(self, prompt, generator, num_inference_steps, kwargs)

    return Broken


def run(pipe_class, wan):
    pipe = pipe_class(**{k: v for k, v in wan.components.items() if not k.endswith("_2")})
    return policy(pipe, pipeline_kwargs={}).sample(["a"], noise_seeds=[0], step_seeds=[0], steps=[1])


def test_pipelines_that_break_a_rule(wan):
    def never(self, prompt, generator, n, kwargs):
        return None

    def copied(self, prompt, generator, n, kwargs):
        scheduler = copy.deepcopy(self.scheduler)
        return scheduler

    def twice(self, prompt, generator, n, kwargs):
        self.scheduler.set_timesteps(n)
        x = torch.randn(1, 2, generator=generator[0])
        for t in self.scheduler.timesteps:
            for _ in range(2):
                x = self.scheduler.step(x, t, x, return_dict=False)[0]

    def edits(self, prompt, generator, n, kwargs):
        self.scheduler.set_timesteps(n)
        x = torch.randn(1, 2, generator=generator[0])
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(x, t, x, return_dict=False)[0] + 0.1

    def few(self, prompt, generator, n, kwargs):
        self.scheduler.set_timesteps(n)
        x = torch.randn(1, 2, generator=generator[0])
        for t in self.scheduler.timesteps[:2]:
            x = self.scheduler.step(x, t, x, return_dict=False)[0]

    def again(self, prompt, generator, n, kwargs):
        x = torch.randn(1, 2, generator=generator[0])
        for _ in range(2):
            self.scheduler.set_timesteps(n)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(x, t, x, return_dict=False)[0]

    for step, message in (
        (again, "sets its timesteps again after 4"),
        (never, "never called"),
        (copied, "steps with copies of its scheduler"),
        (twice, "more than once per timestep"),
        (edits, "changes the latents"),
        (few, "took 2 scheduler steps for 4"),
    ):
        with pytest.raises(PolicyError, match=message):
            run(broken(step), wan)


def test_diffusion_forcing_steps_copies_of_its_scheduler():
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    pipe = quiet(SkyReelsV2DiffusionForcingPipeline(**skyreels_parts()))
    call = dict(height=16, width=16, num_frames=9, base_num_frames=9, max_sequence_length=16)
    for ar_step in (0, 5):  # synchronous, too
        with pytest.raises(PolicyError, match="copies of its scheduler.*one step of pipeline.scheduler per denoising"):
            kwargs = call | dict(ar_step=ar_step, causal_block_size=1)
            policy(pipe, pipeline_kwargs=kwargs).sample(["a"], noise_seeds=[0], step_seeds=[0], steps=[1])


def test_start_noise_that_is_not_from_the_generators(wan):
    from diffusers import WanPipeline

    class Careless(WanPipeline):
        def prepare_latents(self, *args, **kwargs):
            return torch.randn_like(super().prepare_latents(*args, **kwargs))

    pipe = Careless(**{k: v for k, v in wan.components.items() if not k.endswith("_2")})
    careless = policy(quiet(pipe))
    rollout = careless.sample(["a"], noise_seeds=[0], step_seeds=[0], steps=[0])
    with pytest.raises(PolicyError, match="not reproducible from its generators"):
        careless.replay(rollout, [0], lambda step: None)


def test_deterministic_steps_cannot_be_trained(wan):
    with pytest.raises(PolicyError, match="standard deviation 0"):
        policy(wan, noise_level=0.0).sample(["a"], noise_seeds=[0], step_seeds=[0], steps=[1])
    with pytest.raises(ValueError, match="step_seeds must be given"):
        policy(wan).sample(["a"], noise_seeds=[0], steps=[1])


def test_windows_lie_in_their_range(wan):
    p = policy(wan, num_inference_steps=10, sde_window_size=2, sde_window_range=(1, 6))
    windows = {tuple(p.draw_window(seed)) for seed in range(200)}
    assert windows == {(i, i + 1) for i in range(1, 5)}
    assert policy(wan).draw_window(0) == [0, 1, 2]


def test_latents_rounded_by_the_pipeline_are_scored_as_rounded():
    """Mochi keeps bf16 latents between fp32 scheduler steps."""
    pipe = quiet(BUILD["mochi"]())
    pipe.transformer.to(torch.bfloat16), pipe.text_encoder.to(torch.bfloat16), pipe.vae.to(torch.bfloat16)
    p = VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS["mochi"])
    rollout = p.sample(["a", "b"], noise_seeds=[0, 1], step_seeds=[0, 1], steps=[0, 1, 2], output_type="latent")
    assert torch.equal(rollout.states[1], rollout.states[1].bfloat16().float())
    found = []
    p.replay(rollout, [0, 1], lambda s: found.append((s.log_prob - rollout.log_probs[:, s.index]).abs().max()))
    assert max(found) == 0


def test_prompts_are_encoded_once_and_alone(wan):
    p = policy(wan)
    calls = []
    original = p.prompt_memo.encode_prompt

    def counted(*args, **kwargs):
        calls.append(kwargs["prompt"])
        return original(*args, **kwargs)

    p.prompt_memo.encode_prompt = counted
    first = p.sample(["x", "y", "x", ""], noise_seeds=[0, 1, 0, 2]).videos
    p.sample(["y"], noise_seeds=[1])
    assert calls == [["x"], ["y"], [""]]
    torch.testing.assert_close(first[0], first[2])


def test_empty_negative_prompts_are_encoded_once(monkeypatch):
    """HunyuanVideo 1.5 asks for them by prompt=None and a batch_size, by which it reshapes what it encodes."""
    pipe = quiet(BUILD["hunyuan15"]())
    p = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["hunyuan15"] | GUIDANCE["hunyuan15"][0])
    calls, original = [], p.prompt_memo.encode_prompt
    monkeypatch.setattr(p.prompt_memo, "encode_prompt", lambda **kw: calls.append(kw["prompt"]) or original(**kw))
    rollout = p.sample(["x", "y", "x"], noise_seeds=[0, 1, 0], step_seeds=[2, 3, 2], steps=[0])
    p.replay(rollout, [1, 2], lambda step: None)
    assert calls == [["x"], ["y"], None]
    torch.testing.assert_close(rollout.videos[0], rollout.videos[2])


class Unguided(ClassifierFreeGuidance):
    @register_to_config
    def __init__(self, start: float = 0.0):
        super().__init__(guidance_scale=1.0, start=start)
        self._internal_dict = {"start": start}


def test_a_guider_has_the_scale_of_the_call_and_then_its_own():
    pipe = quiet(BUILD["hunyuan15"]())
    p = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["hunyuan15"])
    own, six, one = (
        VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=p.pipeline_kwargs | extra)
        for extra in ({}, {"guidance_scale": 6.0}, {"guidance_scale": 1.0})
    )
    videos = [each.sample(["a"], noise_seeds=[0]).videos for each in (own, six, one)]
    assert torch.equal(videos[0], videos[1]) and not torch.allclose(videos[0], videos[2], atol=1e-4)
    assert pipe.guider.guidance_scale == 6.0
    pipe.guider = Unguided()
    with pytest.raises(
        PolicyError, match="guidance_scale=1.0: this pipeline's guider, .*Unguided, has no guidance_scale"
    ):
        one.sample(["a"], noise_seeds=[0])


def test_text_of_another_length_beside_it_changes_nothing():
    """Kandinsky 5 takes no text mask, so padding would be read; each row gets the text of its own length."""
    pipe = quiet(BUILD["kandinsky5"]())
    p = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["kandinsky5"])
    prompts = ["a bird in the snow", "a", "a fish", "b"]
    together = p.sample(prompts, noise_seeds=[0, 1, 2, 3]).videos
    for row, prompt in enumerate(prompts):
        alone = p.sample([prompt], noise_seeds=[row]).videos
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)
