"""Kernels against exact moments, the ODE, and torch.distributions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from pisces_rl.transitions import TRANSITIONS, ancestral, cps, dance_sde, ddim, flow_sde, flow_sde_linear, log_prob

TARGET_STD, SHIFT = 0.3, 3.0
SDES = {"flow_sde": (flow_sde, 0.7), "flow_sde_linear": (flow_sde_linear, 1.0), "dance_sde": (dance_sde, 0.3)}


def schedule(num_steps: int) -> torch.Tensor:
    s = torch.linspace(1, 1 / 1000, num_steps, dtype=torch.float64)
    return torch.cat([SHIFT * s / (1 + (SHIFT - 1) * s), torch.zeros(1, dtype=torch.float64)])


def propagate(kernel, noise_level: float, num_steps: int) -> float:
    """Standard deviation of the samples for x0 ~ N(0, .3^2) and the exact v, moments propagated exactly.

    The exact velocity is linear, v = c x, so a kernel's mean is k x and Var' = k^2 Var + std^2.
    """
    sigmas, variance = schedule(num_steps), torch.ones((), dtype=torch.float64)
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        marginal = (1 - s) ** 2 * TARGET_STD**2 + s**2
        slope = (s - (1 - s) * TARGET_STD**2) / marginal  # E[e - x0 | x] = slope x
        one = torch.ones((), dtype=torch.float64)
        factor, std = kernel(one, slope, s, s_next, noise_level=noise_level, sigma_max=sigmas[1], sigma_min=sigmas[-1])
        variance = factor**2 * variance + std**2
    return float(variance.sqrt())


@pytest.mark.parametrize("name", SDES)
def test_sde_keeps_the_marginal_to_first_order(name):
    kernel, noise_level = SDES[name]
    errors = {n: abs(propagate(kernel, noise_level, n) - TARGET_STD) for n in (125, 250, 500, 1000)}
    assert errors[1000] <= 2e-3
    for n in (125, 250, 500):  # halves when N doubles; flow_sde, whose g grows with N at the first step, a bit faster
        assert 1.8 < errors[n] / errors[2 * n] < 2.5, errors


def test_sde_moves_towards_the_marginal_where_the_ode_falls_short():
    """At 16 steps the Euler ODE contracts the target's .300 to .221; the SDEs lie between."""
    ode = propagate(flow_sde, 0.0, 16)
    assert ode == pytest.approx(0.221, abs=1e-3)
    for kernel, noise_level in SDES.values():
        assert ode < propagate(kernel, noise_level, 16) < TARGET_STD


def test_cps_does_not_keep_the_marginal():
    assert propagate(cps, 0.7, 1000) == pytest.approx(0.253, abs=1e-3)


def test_cps_against_its_own_recursion():
    """x0^ and e^ are linear in x: Var' = ((1-s')(1 - s c) + sqrt(s'^2 - std^2)(1 + (1-s) c))^2 Var + std^2."""
    noise_level = 0.8
    sigmas, variance = schedule(200), 1.0
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        slope = (s - (1 - s) * TARGET_STD**2) / ((1 - s) ** 2 * TARGET_STD**2 + s**2)
        std = s_next * math.sin(noise_level * math.pi / 2)
        factor = (1 - s_next) * (1 - s * slope) + math.sqrt(s_next**2 - std**2) * (1 + (1 - s) * slope)
        variance = factor**2 * variance + std**2
    assert propagate(cps, noise_level, 200) == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("name", ["flow_sde", "flow_sde_linear", "dance_sde", "cps"])
def test_noise_level_0_is_the_euler_step(name):
    x, v = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    s, s_next = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    mean, std = TRANSITIONS[name].kernel(x, v, s, s_next, noise_level=0.0, sigma_max=s, sigma_min=torch.zeros_like(s))
    assert float(std) == 0
    torch.testing.assert_close(mean, x + v * (s_next - s))


def test_first_sigma_just_below_one():
    """UniPC's first sigma, 0.99999899: without the bound g would be about 700."""
    s, s_next = torch.tensor(0.99999899), torch.tensor(0.98)
    _, std = flow_sde(
        torch.zeros(1), torch.zeros(1), s, s_next, noise_level=0.7, sigma_max=s_next, sigma_min=torch.tensor(0.0)
    )
    assert float(std) < 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(prediction_type, eta):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x, out, noise = torch.randn(3, 2, 4, 4, 4).unbind(0)
    for t in scheduler.timesteps.tolist():
        a, prev = scheduler.alphas_cumprod[t], t - 100
        a_next = scheduler.alphas_cumprod[prev] if prev >= 0 else scheduler.final_alpha_cumprod
        mean, std = ddim(x, out, a, a_next, noise_level=eta, prediction_type=prediction_type)
        expected = scheduler.step(out, t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + std * noise, expected, rtol=1e-4, atol=1e-4)


def test_ddim_at_zero_terminal_snr_and_unknown_prediction():
    x, v = torch.randn(2, 8), torch.randn(2, 8)
    mean, std = ddim(x, v, torch.tensor(0.0), torch.tensor(0.1), noise_level=1.0, prediction_type="v_prediction")
    assert torch.isfinite(mean).all() and float(std) == pytest.approx(math.sqrt(0.9))
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        ddim(x, v, torch.tensor(0.5), torch.tensor(0.6), noise_level=1.0, prediction_type="flow")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_is_ddim_in_other_coordinates_and_edm_s_euler_step(eta):
    x, x0, s, s_next = 5 * torch.randn(2, 8), torch.randn(2, 8), torch.tensor(5.0), torch.tensor(1.5)
    a, a_next = 1 / (1 + s**2), 1 / (1 + s_next**2)
    mean, std = ancestral(x, x0, s, s_next, noise_level=eta)
    expected, spread = ddim(x * a.sqrt(), x0, a, a_next, noise_level=eta, prediction_type="sample")
    torch.testing.assert_close(mean, expected / a_next.sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(std, spread / a_next.sqrt())
    if eta == 1:  # k-diffusion: sigma_up^2 = s'^2 (s^2 - s'^2) / s^2
        assert float(std) == pytest.approx(float(s_next * ((s**2 - s_next**2) / s**2).sqrt()))
    if eta == 0:
        scheduler = EDMEulerScheduler()
        scheduler.set_timesteps(4)
        scheduler.sigmas[:2] = torch.stack([s, s_next])
        scheduler.set_begin_index(0)
        own = scheduler.step(x0, scheduler.timesteps[0], x, pred_original_sample=x0).prev_sample
        torch.testing.assert_close(mean, own, rtol=1e-5, atol=1e-5)
    assert float(ancestral(x, x0, s, torch.zeros(()), noise_level=eta)[1]) == 0


@pytest.mark.parametrize("rows_per_video", [1, 3])
def test_log_prob_equals_torch_distributions(rows_per_video):
    mean, x_next, std = torch.randn(6, 4, 5), torch.randn(6, 4, 5), 0.37
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
    expected = expected.view(-1, rows_per_video).mean(1)
    torch.testing.assert_close(log_prob(x_next, mean, std, rows_per_video), expected)
