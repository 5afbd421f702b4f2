"""Schedules: one algebra for every family of noise schedules."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from pisces_rl.policy.schedule.scheduler import find_transition, training_scheduler
from pisces_rl.policy.schedule.schedules import InvertedFlowSchedule, Schedule, schedule_of
from pisces_rl.transitions import TRANSITIONS

STEPS = 5
X0, NOISE = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)


def epsilon(schedule, i):
    return NOISE


def v_prediction(schedule, i):
    signal, noise = schedule.scales(i)
    return signal * NOISE - noise * X0


#: name: the pipeline's scheduler, and what an exact model predicts from x0 and e.
KINDS = {
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda schedule, i: NOISE - X0),
    "flow, inverted": (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), lambda schedule, i: X0 - NOISE),
    "flow, UniPC": (
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        lambda schedule, i: NOISE - X0,
    ),
    "epsilon": (DDIMScheduler(clip_sample=False), epsilon),
    "epsilon, DPM": (DPMSolverMultistepScheduler(), epsilon),
    "v": (
        CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        v_prediction,
    ),
    "sample": (DDIMScheduler(clip_sample=False, prediction_type="sample"), lambda schedule, i: X0),
    "edm": (EDMEulerScheduler(), lambda schedule, i: X0),
}


def build(kind: str, transition: str | None = None) -> Schedule:
    scheduler = training_scheduler(KINDS[kind][0])
    scheduler.set_timesteps(STEPS)
    return schedule_of(scheduler, find_transition(transition, scheduler))


@pytest.mark.parametrize("kind", KINDS)
def test_in_flow_coordinates_every_family_is_a_flow(kind):
    """x / (signal + noise) = (1 - t) x0 + t e, and t falls from noise to data."""
    schedule = build(kind)
    times = [float(schedule.time(i)) for i in range(STEPS)]
    assert schedule.num_steps == STEPS and 0.9 < times[0] <= 1 and times[-1] > 0
    assert times == sorted(times, reverse=True) and len(set(times)) == STEPS
    for i in range(STEPS):
        t, scale = schedule.time(i), sum(schedule.scales(i))
        torch.testing.assert_close(schedule.noised(i, X0, NOISE) / scale, (1 - t) * X0 + t * NOISE)


def test_time_from_the_level():
    """Sigma of a flow, sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) of an alpha-bar and s / (1 + s) of an EDM schedule."""
    for i in range(STEPS):
        for kind in ("flow", "flow, inverted"):
            assert torch.equal(build(kind).time(i), build(kind).level(i))
        a, s = build("epsilon").level(i), build("edm").level(i)
        torch.testing.assert_close(build("epsilon").time(i), (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt()))
        torch.testing.assert_close(build("edm").time(i), s / (1 + s))
    assert build("v").level(0) == 0 and build("v").time(0) == 1  # zero terminal SNR


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_prediction_returns_the_clean_sample(kind):
    """Noised, then denoised by what an exact model predicts; in bf16 it is still computed in fp32."""
    schedule, exact = build(kind), KINDS[kind][1]
    for i in range(STEPS):
        found = schedule.denoised(i, exact(schedule, i), schedule.noised(i, X0, NOISE))
        torch.testing.assert_close(found, X0, rtol=1e-4, atol=2e-4)
    assert schedule.denoised(1, X0.bfloat16(), NOISE.bfloat16()).dtype == torch.float32
    assert schedule.noised(1, X0.bfloat16(), NOISE.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_ode_follows_the_exact_prediction_to_the_next_level(kind):
    """Without noise the transition goes from (x0, e) at one level to (x0, e) at the next, and ends at x0."""
    schedule, exact = build(kind), KINDS[kind][1]
    for i in range(STEPS):
        mean, std = schedule.moments(i, exact(schedule, i), schedule.noised(i, X0, NOISE), 0.0)
        assert float(std) == 0
        if i + 1 < STEPS:
            torch.testing.assert_close(mean, schedule.noised(i + 1, X0, NOISE), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(mean, X0, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_of_every_family(kind):
    """(y - x0^) / t with y = x / (signal + noise) is e - x0 where the prediction is exact."""
    schedule, exact = build(kind), KINDS[kind][1]
    for i in range(STEPS - 1):
        x = schedule.noised(i, X0, NOISE)
        y, clean = x / sum(schedule.scales(i)), schedule.denoised(i, exact(schedule, i), x)
        torch.testing.assert_close((y - clean) / schedule.time(i), NOISE - X0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind, sign", [("flow", 1), ("flow, inverted", -1), ("flow, UniPC", 1)])
def test_velocities_differ_by_the_clean_predictions_over_t(kind, sign):
    """v - v' = -(x0^ - x0^') / t of two predictions from one x, where the model predicts v itself or -v."""
    schedule, i = build(kind), 2
    x, one, other = torch.randn(3, *X0.shape, generator=torch.Generator().manual_seed(1)).unbind(0)
    difference = schedule.denoised(i, sign * one, x) - schedule.denoised(i, sign * other, x)
    torch.testing.assert_close(one - other, -difference / schedule.time(i), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, value in TRANSITIONS.items() if value.family == "flow"])
def test_mochi_s_inversion_changes_nothing_but_the_sign(name):
    """Inverted sigmas and x0 - e give the numbers of plain sigmas and e - x0, for every kernel of flow matching."""
    plain, inverted = build("flow", name), build("flow, inverted", name)
    assert isinstance(inverted, InvertedFlowSchedule)
    inverted.sigmas = plain.sigmas
    x, velocity = plain.noised(1, X0, NOISE), NOISE - X0
    for own, expected in zip(inverted.moments(1, -velocity, x, 0.3), plain.moments(1, velocity, x, 0.3)):
        assert torch.equal(own, expected)
    assert torch.equal(inverted.denoised(1, -velocity, x), plain.denoised(1, velocity, x))


def test_step_sizes():
    """|s' - s| of a flow schedule, 1 / N of any other."""
    for kind in ("flow", "flow, inverted"):
        schedule = build(kind)
        assert sum(float(schedule.step_size(i)) for i in range(STEPS)) == pytest.approx(1, abs=1e-3)
        assert float(schedule.step_size(1)) == pytest.approx(float(schedule.level(1) - schedule.level(2)))
    for kind in ("epsilon", "v", "edm"):
        assert float(build(kind).step_size(1)) == pytest.approx(1 / STEPS)
