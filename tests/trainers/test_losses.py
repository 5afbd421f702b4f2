"""The objective: formulas, gradients by finite differences, and TRL's own `_compute_loss` on the same numbers."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from pisces_rl.trainers.rollouts.losses import (
    clip_fractions,
    clipped_policy_loss,
    guarded_log_ratio,
    kl_to_reference,
    prediction_distance,
    step_weight,
)
from pisces_rl.transitions import log_prob

B, T = 6, 5  # samples and denoising steps: a token of a language model is a step here


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(B, T, generator=generator, requires_grad=True)
    old = new.detach() + 0.3 * torch.randn(B, T, generator=generator)
    return new, old, torch.randn(B, generator=generator)


def trl_loss(new, old, advantages, loss_type: str, level: str, epsilon_low: float, epsilon_high: float):
    """The real GRPOTrainer._compute_loss on given log-probs; no language model is needed."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x.reshape(-1), sync_gradients=True, reduce=lambda x, reduction=None: x
    )
    metrics = {"train": defaultdict(list)}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros(B, T), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=True),
        current_gradient_accumulation_steps=1,
        accelerator=accelerator,
        max_completion_length=T,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        vllm_importance_sampling_correction=False,
    )
    ids, ones = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ids,
        "completion_mask": ones,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": torch.tensor(float(B * T)),
    }
    return GRPOTrainer._compute_loss(stub, None, inputs), metrics["train"]


def our_loss(new, old, advantages, epsilon_low: float, epsilon_high: float):
    """As the trainer sums it: one step at a time, divided by samples and steps."""
    return sum(
        clipped_policy_loss(new[:, k] - old[:, k], advantages, epsilon_low, epsilon_high).sum() / (B * T)
        for k in range(T)
    )


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_every_step_counts_as_a_token_of_trl(batch, loss_type):
    """All videos have the same number of steps, so TRL's four normalisations are one: ours. Value and gradient."""
    new, old, advantages = batch
    theirs, metrics = trl_loss(new, old, advantages, loss_type, "token", 0.2, 0.28)
    ours = our_loss(new, old, advantages, 0.2, 0.28)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(ours, new)[0], torch.autograd.grad(theirs, new)[0], rtol=1e-5, atol=1e-8
    )
    fractions = [clip_fractions(new[:, k] - old[:, k], advantages, 0.2, 0.28) for k in range(T)]
    assert metrics["clip_ratio/low_mean"][0] == pytest.approx(sum(float(low) for low, _ in fractions) / T)
    assert metrics["clip_ratio/high_mean"][0] == pytest.approx(sum(float(high) for _, high in fractions) / T)
    assert 0 < metrics["clip_ratio/region_mean"][0] < 1  # the data does clip


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_a_sequence_level_ratio_of_trl_is_ours_of_the_mean(batch, loss_type):
    new, old, advantages = batch
    theirs, _ = trl_loss(new, old, advantages, loss_type, "sequence", 0.2, 0.2)
    ours = clipped_policy_loss((new - old).mean(1), advantages, 0.2, 0.2).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_clipping_removes_the_gradient_on_the_improving_side_only():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    log_ratio = ratio.log().requires_grad_()
    loss = clipped_policy_loss(log_ratio, advantage, 0.2, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.3, -0.7, 0.8, -1.1]))
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, 1.3, -0.7, 0.0, -1.1]))
    low, high = clip_fractions(log_ratio, advantage, 0.2, 0.2)
    assert (float(low), float(high)) == pytest.approx((0.2, 0.2))


def test_gradient_at_ratio_one_is_minus_the_advantage():
    advantage = torch.tensor([2.0, -1.0, 0.0])
    log_ratio = torch.zeros(3, requires_grad=True)
    clipped_policy_loss(log_ratio, advantage, 1e-4, 1e-4).sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantage)


def finite_difference(function, at: torch.Tensor, direction: torch.Tensor, step: float = 1e-5) -> float:
    return float(function(at + step * direction) - function(at - step * direction)) / (2 * step)


@pytest.mark.parametrize("rows", [1, 3])
def test_kl_gradient_equals_its_finite_difference(rows):
    """A KL computed under no_grad trains nothing and logs a plausible number: its gradient must be there."""
    generator = torch.Generator().manual_seed(1)
    mean, reference, direction = torch.randn(3, 2 * rows, 4, 3, generator=generator, dtype=torch.double)
    std = torch.tensor(0.4, dtype=torch.double)
    for function in (
        lambda m: kl_to_reference(m, reference, std, rows).sum(),
        lambda m: prediction_distance(m, reference, rows).sum(),
        lambda m: guarded_log_ratio(torch.zeros(2, dtype=torch.double), m, reference, std, rows).sum(),
    ):
        variable = mean.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(variable), variable)
        expected = finite_difference(function, mean, direction)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 2])
def test_kl_is_the_gaussians_per_dimension(rows):
    generator = torch.Generator().manual_seed(2)
    mean, reference = torch.randn(2, 3 * rows, 5, generator=generator)
    std = torch.tensor(0.3)
    exact = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, std), torch.distributions.Normal(reference, std)
        )
        .view(3, -1)
        .mean(1)
    )
    torch.testing.assert_close(kl_to_reference(mean, reference, std, rows), exact)
    assert kl_to_reference(mean, mean, std, rows).tolist() == [0.0] * 3
    expected = (mean - reference).square().view(3, -1).mean(1)
    torch.testing.assert_close(prediction_distance(mean, reference, rows), expected)


def test_the_guarded_ratio_has_mean_one():
    """log p - log p_old = -|m - m_old|^2 / 2 std^2 on average over x' ~ p_old: RatioNorm removes just that."""
    generator = torch.Generator().manual_seed(3)
    old_mean = torch.randn(1, 50_000, generator=generator)
    mean, std = old_mean + 0.1, torch.tensor(0.5)
    x_next = old_mean + std * torch.randn(old_mean.shape, generator=generator)
    log_ratio = log_prob(x_next, mean, std) - log_prob(x_next, old_mean, std)
    bias = 0.1**2 / (2 * 0.5**2)
    assert float(log_ratio) == pytest.approx(-bias, abs=2e-3)
    assert float(guarded_log_ratio(log_ratio, mean, old_mean, std)) == pytest.approx(0.0, abs=1e-3)
    by_hand = std * (log_ratio + (mean - old_mean).square().mean(1) / (2 * std**2))
    torch.testing.assert_close(guarded_log_ratio(log_ratio, mean, old_mean, std), by_hand)


def test_step_weights():
    std, gain, dt = torch.tensor(0.5), torch.tensor(0.25), torch.tensor(0.1)
    assert float(step_weight("none", std, gain, dt)) == 1
    assert float(step_weight("longcat", std, gain, dt)) == pytest.approx(2.0)
    assert float(step_weight("guard", std, gain, dt)) == pytest.approx(10.0)


def test_longcat_weight_cancels_the_sensitivity_of_a_step():
    """The gradient of weight * log p with respect to the prediction has the same scale at every step."""
    generator = torch.Generator().manual_seed(4)
    norms = []
    for std, gain in ((0.05, 0.4), (0.6, 0.02)):
        prediction = torch.zeros(1, 20_000, requires_grad=True)
        mean = gain * prediction
        x_next = mean.detach() + std * torch.randn(mean.shape, generator=generator)
        weight = step_weight("longcat", torch.tensor(std), torch.tensor(gain), torch.tensor(0.1))
        (weight * log_prob(x_next, mean, torch.tensor(std))).sum().backward()
        norms.append(float(prediction.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
