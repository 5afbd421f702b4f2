"""Flash-GRPO, Flow-DPPO, and a subclass with a custom loss."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    Gradients,
    brightness,
    config,
    enliven,
    largest_difference,
    logged,
    pipeline,
    prompts,
    trainer,
    weights,
)
from torch.distributions import Normal, kl_divergence
from transformers import TrainerCallback

from pisces_rl.policy import ReplayStep, Rollout
from pisces_rl.trainers.base.data.seeds import sample_seed
from pisces_rl.trainers.grpo.flow_dppo import FlowDPPOTrainer
from pisces_rl.trainers.rollouts.advantages import group_advantages
from pisces_rl.trainers.rollouts.rollout_trainer import STEP

EXAMPLES = Path(__file__).parents[2] / "examples"

# --- Flash-GRPO: windows ---------------------------------------------------------------------------------------------


def flash(folder, rewards=brightness, **settings):
    """Four prompts a rollout, each with a window of one of five steps."""
    return trainer(
        folder,
        rewards,
        data=prompts(4),
        method="flash_grpo",
        **{
            "num_generations": 2,
            "per_device_train_batch_size": 8,
            "num_inference_steps": 6,
            "epsilon": 0.5,
            "max_steps": 1,
            "alive": True,
            "num_sample_videos": 0,
        }
        | settings,
    )


def windows(made) -> list[tuple[int, ...]]:
    """Of each video of the rollout."""
    found = {row: tuple(samples.steps) for rows, samples in made.scored.parts for row in rows}
    return [found[row] for row in sorted(found)]


def test_each_prompt_has_its_own_window(tmp_path):
    """The videos of a group share it; the next rollout draws others; an optimizer step sees several."""
    made = flash(tmp_path, max_steps=2)
    seen = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(windows(made))

    made.add_callback(Keep())
    made.train()
    for steps in seen:
        assert len(steps) == 8 and all(len(window) == 1 for window in steps)
        assert steps[::2] == steps[1::2] and len(set(steps)) > 1
    assert seen[0] != seen[1]
    for row, steps in zip(made.state.log_history, seen):
        trained = {int(key.rpartition("_")[2]) for key in row if key.startswith("grad_norm/step_")}
        assert trained == {window[0] for window in steps}
    assert max(logged(made, "replay/max_log_prob_error")) <= 1e-5


class FlashByHand(TrainerCallback):
    """The gradient of all videos' transitions in one graph."""

    trainer = gradient = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, total = self.trainer, 0.0
        for rows, samples in made.scored.parts:
            steps = []
            made.policy.replay(samples, range(len(samples)), steps.append)
            (step,) = steps
            ratio, advantage = (step.log_prob - samples.log_probs[:, 0]).exp(), made.scored.advantages[rows]
            total = total - (step.std / step.gain * advantage * ratio).sum() / 8
        self.gradient = dict(zip(made.adapter, torch.autograd.grad(total, list(made.adapter.values()))))


@pytest.mark.parametrize(
    "division",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"rollout_batch_size": 3},
    ],
    ids=["whole", "4x2", "rollout-in-parts"],
)
def test_windows_of_several_prompts_have_one_gradient(tmp_path, division):
    by_hand, gradients = FlashByHand(), Gradients()
    made = flash(tmp_path, callbacks=[gradients, by_hand], max_grad_norm=0.0, **division)
    by_hand.trainer = made
    made.train()
    assert len(made.scored.parts) > 1
    for name, expected in by_hand.gradient.items():
        scale = float(expected.abs().max())
        assert scale > 0 and float((gradients.steps[0][f"denoiser.{name}"] - expected).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_with_one_window_share_a_call(tmp_path, overlap):
    """Their rows need not be neighbours (windows a, b, a); videos and rewards still belong to the right rows."""
    scored = []

    def kept(prompts, videos, **columns):
        scored.append((prompts, videos))
        return brightness(prompts, videos)

    made = flash(
        tmp_path,
        rewards=kept,
        overlap_rewards=overlap,
        learning_rate=0.0,
        sde_window_range=(0, 2),
        rollout_batch_size=4,
        seed=0,
    )
    calls, sample = [], made.policy.sample

    def counted(prompts, **keywords):
        calls.append(tuple(keywords["steps"]))
        return sample(prompts, **keywords)

    made.policy.sample = counted
    made.train()
    assert windows(made)[::2] == [(0,), (1,), (0,), (1,)]
    assert len(calls) == len(set(calls)) == 2 and len(scored) == (2 if overlap else 1)
    table = {}
    for rows, samples in made.scored.parts:
        videos = (
            next(videos for prompts, videos in scored if prompts == samples.prompts) if overlap else scored[0][1][rows]
        )
        again = sample(
            samples.prompts,
            noise_seeds=samples.noise_seeds,
            step_seeds=[step_seed(made, row) for row in rows],
            steps=samples.steps,
        )
        assert torch.equal(again.videos, videos)
        table |= dict(zip(rows, brightness(samples.prompts, videos).tolist()))
    rewards = torch.tensor([table[row] for row in range(8)], dtype=torch.float64)
    expected = group_advantages(rewards[:, None], torch.ones(1), 2)[0]
    assert torch.allclose(made.scored.advantages, expected)


def step_seed(made, row: int) -> int:
    return sample_seed(made.args.seed, 0, STEP, row)


def test_the_weight_is_the_papers(tmp_path):
    """1 / c, c = sqrt(D) / s + s sqrt(D) (1 - sigma) / (2 sigma), with flow_sde_linear's s and D = sigma - sigma'."""
    made = flash(tmp_path, transition="flow_sde_linear", noise_level=0.8, sde_window_size=5)
    made.train()
    ((_, samples),) = made.scored.parts
    steps = []
    made.policy.replay(samples, [0], steps.append, grad=False)
    sigmas = [made.policy.predict(samples, [0], noise_seeds=[0], step=index).time.double() for index in range(6)]
    for step in steps:
        sigma, apart = sigmas[step.index], sigmas[step.index] - sigmas[step.index + 1]
        s = step.std / apart.sqrt()
        c = apart.sqrt() / s + s * apart.sqrt() * (1 - sigma) / (2 * sigma)
        assert float(step.std / step.gain) == pytest.approx(float(1 / c), rel=1e-4)


# --- Flow-DPPO: the mask ---------------------------------------------------------------------------------------------


def dppo(folder, **settings) -> FlowDPPOTrainer:
    """A trainer that has settings, and nothing else."""
    made = FlowDPPOTrainer.__new__(FlowDPPOTrainer)
    made.args = config(folder, "flow_dppo", **settings)
    return made


def test_the_mask_covers_far_videos_that_move_further(tmp_path):
    """Near or far, ratio above or below 1, advantage of either sign: eight videos of two rows."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(16, 3, 5, generator=generator, dtype=torch.float64)
    std, limit = torch.tensor(0.3, dtype=torch.float64), 1e-3
    far = torch.tensor([False, True] * 4)
    moved = torch.randn(16, 3, 5, generator=generator, dtype=torch.float64)
    mean = (old + moved * torch.where(far, 0.1, 0.001).repeat_interleave(2)[:, None, None]).requires_grad_()
    log_ratio = (torch.tensor([1, 1, -1, -1] * 2) * 0.2).double().requires_grad_()
    advantage = torch.tensor([1.5] * 4 + [-0.5] * 4).double()
    divergence = kl_divergence(Normal(old, std), Normal(mean.detach(), std)).view(8, -1).mean(1)
    assert ((divergence > limit) == far).all()
    samples = Rollout(["a"] * 8, [0] * 8, None, [4], means={4: old}, rows_per_video=2)
    step = ReplayStep(4, log_ratio, mean, mean, std, torch.ones(()), torch.ones(()), list(range(8)))

    made = dppo(tmp_path, divergence_limit=limit)
    left_out = far & (log_ratio.detach() * advantage > 0)
    assert left_out.tolist() == [False, True, False, False, False, False, False, True]
    reads, mean_rows = [], samples.mean_rows
    samples.mean_rows = lambda *asked: reads.append(asked) or mean_rows(*asked)
    loss, low, high = made.policy_loss(step, log_ratio, advantage, samples)
    assert len(reads) == 1  # the divergence is a mean over all latents
    torch.testing.assert_close(loss, (-advantage * log_ratio.exp()) * ~left_out)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(gradient, -advantage * log_ratio.exp() * ~left_out)
    assert (float(low), float(high)) == (1 / 8, 1 / 8)
    assert torch.autograd.gradcheck(lambda ratio: made.policy_loss(step, ratio, advantage, samples)[0], log_ratio)


def test_dppo_equals_grpo_within_the_divergence_limit(tmp_path):
    """The first step on a rollout is GRPO's; the second leaves out what a tiny limit forbids, and only that."""
    gradients = {}
    for method, settings in (("grpo", {"epsilon": 0.5}), ("flow_dppo", {})):
        keep = Gradients()
        trainer(tmp_path / method, method=method, alive=True, callbacks=[keep], max_steps=1, **settings).train()
        gradients[method] = keep.steps[0]
    assert largest_difference(gradients["grpo"], gradients["flow_dppo"]) < 1e-6
    made = trainer(
        tmp_path / "tight", method="flow_dppo", alive=True, num_iterations=2, max_steps=2, divergence_limit=1e-12
    )
    made.train()
    region, low, high = (logged(made, f"clip_ratio/{name}_mean") for name in ("region", "low", "high"))
    assert region[0] == 0 < region[1] < 1 and region[1] == pytest.approx(low[1] + high[1])


@pytest.mark.parametrize("method", ["flash_grpo", "flow_dppo"])
def test_equal_rewards_train_nothing(tmp_path, method):
    made = trainer(
        tmp_path,
        lambda prompts, videos, **columns: [0.5] * len(prompts),
        method=method,
        alive=True,
        max_steps=1,
        weight_decay=0.0,
    )
    before = weights(made)
    made.train()
    assert largest_difference(before, weights(made)) == 0 and logged(made, "frac_reward_zero_std") == [1.0]


class AnchorByHand(TrainerCallback):
    """The gradient of beta KL(p || p_ref), or of beta |v - v_ref|^2, of all videos and steps in one graph."""

    trainer = gradient = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, total, count = self.trainer, 0.0, 0
        for _, samples in made.scored.parts:
            own, reference = [], []
            made.policy.replay(samples, range(len(samples)), own.append)
            with made.initial.reference():
                made.policy.replay(samples, range(len(samples)), reference.append, grad=False)
            for step, other in zip(own, reference, strict=True):
                if args.kl_space == "x":
                    distance = kl_divergence(Normal(step.mean, step.std), Normal(other.mean, other.std))
                else:
                    distance = (step.prediction - other.prediction) ** 2
                total = total + distance.flatten(1).mean(1).sum()
                count += len(samples)
        gradient = torch.autograd.grad(args.beta * total / count, list(made.adapter.values()))
        self.gradient = dict(zip(made.adapter, gradient))


@pytest.mark.parametrize("method, space", [("grpo", "x"), ("grpo", "v"), ("flash_grpo", "x"), ("flow_dppo", "x")])
def test_without_an_advantage_only_the_anchor_pulls(tmp_path, method, space):
    by_hand, gradients = AnchorByHand(), Gradients()
    by_hand.trainer = made = trainer(
        tmp_path,
        lambda prompts, videos, **columns: [0.5] * len(prompts),
        method=method,
        alive=True,
        max_steps=1,
        beta=0.3,
        kl_space=space,
        max_grad_norm=0.0,
        callbacks=[gradients, by_hand],
        num_sample_videos=0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    made.train()
    assert logged(made, "kl")[0] > 0 and not made.scored.advantages.any()
    for name, expected in by_hand.gradient.items():
        scale = float(expected.abs().max())
        assert scale > 0 and float((gradients.steps[0][f"denoiser.{name}"] - expected).abs().max()) <= 1e-4 * scale


# --- a custom loss ---------------------------------------------------------------------------------------------------


def test_the_example_of_a_custom_loss_runs(tmp_path):
    """Its loss trains instead of GRPO's: nothing is clipped, and the loss rises once the ratio is no longer 1."""
    example = runpy.run_path(str(EXAMPLES / "custom_loss.py"))["PenaltyTrainer"]
    made = example(pipeline(), brightness, config(tmp_path, num_iterations=2, epsilon=1e-4), prompts())
    enliven(made)
    before = weights(made)
    made.train()
    assert logged(made, "clip_ratio/region_mean") == [0.0, 0.0]
    assert logged(made, "loss")[1] > 1e-6 and largest_difference(before, weights(made)) > 0
