"""A stranger's pipeline carries another solver than ours: the policy samples the noise levels of that solver."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LTXEulerAncestralRFScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import BUILD, CALLS, quiet

from pisces_rl.policy import PolicyError, Rollout, VideoPolicy
from pisces_rl.policy.schedule.scheduler import training_scheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNIPC = UniPCMultistepScheduler(flow_shift=3.0, **FLOW)


@pytest.fixture(scope="module")
def wan():
    return quiet(BUILD["wan"]())


def policy(pipe, scheduler, **settings):
    pipe.scheduler = scheduler
    return VideoPolicy(pipe, **dict(num_inference_steps=4, pipeline_kwargs=CALLS["wan"]) | settings)


def on_grid(scheduler, steps, **arguments):
    """The scheduler and the policy's, both with their times set."""
    own, ours = copy.deepcopy(scheduler), training_scheduler(scheduler)
    own.set_timesteps(steps, **arguments), ours.set_timesteps(steps, **arguments)
    return own, ours


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_flow_solvers_keep_their_sigmas(shift, steps):
    """A stranger's Wan carries UniPC or DPM++ with a flow shift, and 4 steps are 1, .9, .75, .5 in the pipeline."""
    multistep = (
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        DEISMultistepScheduler,
        SASolverScheduler,
    )
    solvers = [cls(flow_shift=shift, **FLOW) for cls in multistep]
    solvers += [cls(shift=shift) for cls in (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler)]
    for solver in solvers:
        own, ours = on_grid(solver, steps)
        torch.testing.assert_close(ours.sigmas, own.sigmas.float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.timesteps, 1000 * own.sigmas[:-1].float(), rtol=0, atol=1e-3)


def test_unipc_at_four_steps_by_number():
    """The two grids of the report: 1, .9, .75, .5 by UniPC, and 1, .858, .602, .009 where the shift comes twice."""
    _, ours = on_grid(UNIPC, 4)
    assert ours.sigmas.tolist() == pytest.approx([1, 0.9001, 0.7504, 0.5010, 0], abs=1e-4)
    assert ours.timesteps.tolist() == pytest.approx([1000, 900.12, 750.37, 501.00], abs=0.01)  # UniPC's own are whole


def test_experts_of_the_wan22_recipe():
    """Its window is the 5 of 16 steps of the high-noise expert, at or above 0.875; it ships with UniPC and shift 3."""
    assert (on_grid(UNIPC, 16)[1].timesteps >= 875).tolist() == [True] * 5 + [False] * 11


def test_other_grids_of_flow_solvers():
    """Karras sigmas (Cosmos 2.5), a last sigma above 0, sigmas or a shift that the pipeline passes."""
    given = UniPCMultistepScheduler(use_dynamic_shifting=True, flow_shift=None, **FLOW)
    for solver, arguments in [
        (UniPCMultistepScheduler(use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01, **FLOW), {}),
        (UniPCMultistepScheduler(final_sigmas_type="sigma_min", flow_shift=3.0, **FLOW), {}),
        (DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", flow_shift=3.0, **FLOW), {}),
        (UNIPC, {"sigmas": np.array([1.0, 0.8, 0.3, 0.1])}),
        (given, {"mu": 0.9}),
        (DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW), {"mu": 0.9}),
        (LTXEulerAncestralRFScheduler(), {"sigmas": [1.0, 0.8, 0.3, 0.1, 0.0]}),
    ]:
        own, ours = on_grid(solver, None if "sigmas" in arguments else 4, **arguments)
        torch.testing.assert_close(ours.sigmas, own.sigmas, rtol=0, atol=1e-6)


def test_two_evaluations_a_step_become_one():
    """Heun calls the denoiser twice a step; the policy makes one first-order step of each."""
    for solver in (FlowMatchHeunDiscreteScheduler(shift=3.0), HeunDiscreteScheduler(**DIFFUSION)):
        own, ours = on_grid(solver, 4)
        assert len(own.timesteps) == 7 and ours.timesteps.tolist() == own.timesteps.unique_consecutive().tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_alpha_bar_solvers_keep_their_times(spacing):
    """A stranger's AnimateDiff carries Euler, DPM++ or LCM: other times than DDIM's, which were used before."""
    settings = DIFFUSION | {"timestep_spacing": spacing, "steps_offset": 1}
    for solver in (
        EulerDiscreteScheduler(**settings),
        EulerAncestralDiscreteScheduler(**settings),
        DPMSolverMultistepScheduler(**settings),
        UniPCMultistepScheduler(**settings),
        DPMSolverMultistepScheduler(use_karras_sigmas=True, **settings),
        DEISMultistepScheduler(**settings),
        LCMScheduler(**DIFFUSION),
        TCDScheduler(**DIFFUSION),
        DDPMScheduler(clip_sample=False, **settings),
    ):
        for steps in (1, 2, 4, 20):
            own, ours = on_grid(solver, steps)
            assert torch.equal(ours.timesteps, own.timesteps)
            levels = 1 / (1 + own.sigmas.double() ** 2) if "sigmas" in vars(own) else None
            if levels is None:
                levels = torch.cat([own.alphas_cumprod[own.timesteps].double(), torch.ones(1)])
            torch.testing.assert_close(ours.grid_alphas, levels, rtol=0, atol=1e-6)


def test_pndm_and_kdpm2_keep_their_times():
    """Stable Diffusion 1.5 ships with PNDM, which evaluates its second time twice."""
    pndm = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **DIFFUSION)
    assert on_grid(pndm, 4)[1].timesteps.tolist() == [751, 501, 251, 1]
    assert on_grid(KDPM2DiscreteScheduler(**DIFFUSION), 4)[1].timesteps.tolist() == [999, 666, 333, 0]


def test_native_schedulers_keep_their_grid_to_the_bit():
    """A shift that a stranger set on the scheduler, not in its config, stays."""
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_shift(7.0)
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        shifted,
        EDMDPMSolverMultistepScheduler(),
        DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    ):
        own, ours = on_grid(scheduler, 4)
        torch.testing.assert_close(ours.timesteps, own.timesteps)
        if "sigmas" in vars(own):
            torch.testing.assert_close(ours.sigmas, own.sigmas, rtol=1e-6, atol=0)
    assert torch.equal(ours.timesteps, own.timesteps)


def sigmas_seen(p, run):
    """The sigmas and timesteps with which a policy's pipeline calls its denoiser."""
    seen, forward = [], p.pipeline.transformer.forward

    def entry(*args, timestep, **kwargs):
        seen.append(float(timestep.flatten()[0]))
        return forward(*args, timestep=timestep, **kwargs)

    p.pipeline.transformer.forward = entry
    try:
        run()
    finally:
        del p.pipeline.transformer.forward
    return seen


def test_every_use_of_the_policy_is_on_the_same_grid(wan):
    """Rollout, evaluation, one step, back-propagation and distillation: 1000 sigma of UniPC, fraction included."""
    p = policy(wan, UNIPC, pipeline_kwargs=CALLS["wan"] | {"guidance_scale": 1.0})
    expected = pytest.approx([1000, 900.12, 750.37, 501.00], abs=0.01)
    seed = dict(noise_seeds=[0])
    assert sigmas_seen(p, lambda: p.sample(["a"], step_seeds=[0], steps=[1], **seed)) == expected
    assert sigmas_seen(p, lambda: p.final_latents(["a"], **seed)) == expected
    state = p.final_latents(["a"], **seed)
    video = Rollout(["a"], [0], None, [], clean=state)
    assert sigmas_seen(p, lambda: p.predict(video, [0], step=2, **seed))[-1] == pytest.approx(750.37, abs=0.01)


def test_replay_on_unipcs_grid(wan):
    """The ratio is 1 before the first update; the last step ends at the clean video."""
    p = policy(wan, UNIPC)
    rollout = p.sample(["a", "b"], noise_seeds=[0, 1], step_seeds=[2, 3], steps=[0, 1, 2])
    errors = []
    p.replay(rollout, [0, 1], lambda s: errors.append((s.log_prob - rollout.log_probs[:, s.index]).abs().max()))
    assert len(errors) == 3 and max(errors) == 0


def test_the_policy_says_how_it_samples(wan):
    """The card's reader learns that the numbers are first order, and on whose grid."""
    assert policy(wan, UNIPC).sampler == "first-order Euler, 4 steps on the grid of UniPCMultistepScheduler"
    ours = policy(wan, FlowMatchEulerDiscreteScheduler(shift=3.0)).sampler
    assert ours == "first-order Euler, 4 steps on FlowMatchEulerDiscreteScheduler's grid"


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (
            UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config),
            "WanPipeline is a flow-matching pipeline, but its UniPC.*prediction_type='epsilon'.*use_flow_sigmas=True",
        ),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True and prediction_type='epsilon'"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "use_flow_sigmas=False and .*flow_prediction",
        ),
        (UniPCMultistepScheduler(flow_shift=None, **FLOW), "flow_shift=None, so it cannot make a schedule"),
        (DDIMScheduler(clip_sample=False), "its DDIMScheduler is not set .*FlowMatchEulerDiscreteScheduler"),
        (EulerDiscreteScheduler(), "its EulerDiscreteScheduler is not set"),
    ],
)
def test_a_scheduler_that_does_not_fit_a_flow(wan, scheduler, message):
    """A stranger wrote UniPCMultistepScheduler.from_config(pipe.scheduler.config), and lost the flow."""
    with pytest.raises(PolicyError, match=message):
        policy(wan, scheduler)


@pytest.mark.parametrize("scheduler", [PNDMScheduler(**DIFFUSION), DDIMInverseScheduler(clip_sample=False)])
def test_times_that_are_no_steps(scheduler):
    """Runge-Kutta's extra times, or a schedule that runs from data to noise."""
    pipe = quiet(BUILD["t2v_sd"]())
    pipe.scheduler = scheduler
    with pytest.raises(PolicyError, match="timesteps for 4 steps.*are not one per step"):
        VideoPolicy(pipe, num_inference_steps=4, pipeline_kwargs=CALLS["t2v_sd"]).sample(["a"], noise_seeds=[0])
