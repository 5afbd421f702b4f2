"""VideoGRPOTrainer on a tiny real pipeline: the update, its options, evaluation, and what a run leaves."""

import asyncio
import json
import warnings

import pytest
import tiny_runs
import torch
from datasets import Dataset
from diffusers import WanPipeline
from safetensors.torch import load_file
from tiny_runs import (
    Gradients,
    brightness,
    config,
    largest_difference,
    logged,
    pipeline,
    prompts,
    redness,
    trainer,
    weights,
)
from transformers import TrainerCallback

from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer
from pisces_rl.trainers.base.data.seeds import sample_seed

# --- the gradient ----------------------------------------------------------------------------------------------------


class ByHand(TrainerCallback):
    """Before the first optimizer step, the gradient of the whole objective in one graph."""

    trainer: VideoGRPOTrainer
    gradient: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, rollout = self.trainer, self.trainer.scored.samples
        steps = []
        made.policy.replay(rollout, range(len(rollout)), steps.append)
        ratio = (torch.stack([s.log_prob for s in steps], 1) - rollout.log_probs).exp()
        advantage = made.scored.advantages[:, None]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - args.epsilon, 1 + args.epsilon)).mean()
        gradient = torch.autograd.grad(loss, list(made.adapter.values()), allow_unused=True)
        self.gradient = dict(zip(made.adapter, gradient))


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "rollout_batch_size": 3},
    ],
    ids=["whole", "2x4", "4x2", "rollout-in-parts"],
)
def test_gradient_equals_that_of_the_whole_batch_in_one_graph(tmp_path, settings):
    def not_all(prompts, videos, **columns):
        """Rows without a reward have advantage 0: they are skipped, and still count in the mean."""
        return [None if i in (1, 2, 6) else v for i, v in enumerate(brightness(prompts, videos).tolist())]

    by_hand, gradients = ByHand(), Gradients()
    made = trainer(
        tmp_path, not_all, alive=True, callbacks=[gradients, by_hand], max_steps=1, max_grad_norm=0.0, **settings
    )
    by_hand.trainer = made
    made.train()
    ours = {name.removeprefix("denoiser."): g for name, g in gradients.steps[0].items()}
    assert ours.keys() == by_hand.gradient.keys()
    for name, expected in by_hand.gradient.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        assert float((ours[name] - expected).abs().max()) <= 2e-5 * scale + 1e-9, name
    assert max(logged(made, "replay/max_log_prob_error")) <= 1e-5


def test_accumulation_does_not_change_the_weights(tmp_path):
    """Two optimizer steps, plain SGD: 1 x 8 videos, 2 x 4 and 4 x 2 are the same run."""
    results = []
    for size in (8, 4, 2):
        made = trainer(
            tmp_path / str(size),
            alive=True,
            per_device_train_batch_size=size,
            optim="sgd",
            max_grad_norm=0.0,
            gradient_accumulation_steps=8 // size,
            learning_rate=50.0,
            max_steps=2,
        )
        before = weights(made)
        made.train()
        results.append(weights(made))
    change = largest_difference(before, results[0])
    assert change > 1e-3
    for other in results[1:]:  # the second rollout is of weights that differ in the last digit
        assert largest_difference(results[0], other) < 1e-3 * change


def test_the_ratio_is_exactly_one_before_a_step(tmp_path):
    made = trainer(tmp_path, alive=True, max_steps=2)
    made.train()
    assert logged(made, "replay/max_log_prob_error") == [0.0, 0.0]
    assert logged(made, "ratio/max_deviation") == [0.0, 0.0]
    assert logged(made, "clip_ratio/region_mean") == [0.0, 0.0]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        made = trainer(tmp_path / str(on), alive=True, max_steps=1, gradient_checkpointing=on)
        made.train()
        assert made.pipeline.transformer.gradient_checkpointing is on
        results.append(weights(made))
    assert largest_difference(*results) < 1e-6


def test_one_config_serves_two_trainers(tmp_path):
    args = config(tmp_path, gradient_checkpointing=True, max_steps=1)
    for _ in range(2):
        made = VideoGRPOTrainer(pipeline(), brightness, args, prompts())
        made.train()
        assert made.pipeline.transformer.gradient_checkpointing is True
    assert args.eval_on_start is True and args.gradient_checkpointing is True


def test_only_the_window_is_trained(tmp_path):
    made = trainer(tmp_path, max_steps=3, num_inference_steps=5, sde_window_size=2, sde_window_range=[1, 4])
    made.train()
    for row in made.state.log_history[:3]:
        trained = [int(k.rpartition("_")[2]) for k in row if k.startswith("grad_norm/step_")]
        assert trained in ([1, 2], [2, 3])


@pytest.mark.slow
def test_it_learns(tmp_path):
    """The embedded model's deterministic samples of fixed noise get brighter (measured: .50 to .84 in 10 steps)."""
    made = VideoGRPOTrainer(
        "tiny-wan",
        brightness,
        config(
            tmp_path,
            height=32,
            width=32,
            pipeline_kwargs={"max_sequence_length": 24},
            per_device_train_batch_size=16,
            num_generations=8,
            max_steps=8,
            num_sample_videos=0,
        ),
        prompts(4),
        eval_dataset=prompts(4),
    )
    made.train()
    before, after = logged(made, "eval_reward")
    assert after > before + 50
    assert logged(made, "replay/max_log_prob_error") == [0.0] * 8
    made.save_model()


# --- several updates per rollout, clipping ---------------------------------------------------------------------------


def test_a_second_iteration_has_another_ratio_and_clips(tmp_path):
    made = trainer(tmp_path, alive=True, num_iterations=2, max_steps=4, epsilon=1e-6)
    made.train()
    deviation, region = logged(made, "ratio/max_deviation"), logged(made, "clip_ratio/region_mean")
    assert deviation[0] == deviation[2] == 0 and deviation[1] > 1e-6 and deviation[3] > 1e-6
    assert region[0] == region[2] == 0 and region[1] > 0 and region[3] > 0
    assert len(logged(made, "replay/max_log_prob_error")) == 2  # checked only when the ratio must be 1
    assert len(logged(made, "reward")) == 2  # one rollout for two optimizer steps


def test_the_clip_range_has_two_sides(tmp_path):
    made = VideoGRPOTrainer.__new__(VideoGRPOTrainer)  # it needs only its settings
    made.args = config(tmp_path, epsilon=0.1, epsilon_high=0.3)
    ratio, advantage = torch.tensor([0.5, 0.8, 1.2, 1.5]), torch.tensor([-1.0, -1.0, 1.0, 1.0])
    loss, low, high = made.policy_loss(None, ratio.log(), advantage, None)
    torch.testing.assert_close(loss, torch.tensor([0.9, 0.9, -1.2, -1.3]))
    assert (float(low), float(high)) == (0.5, 0.25)


def test_more_micro_batches_than_accumulation_steps(tmp_path):
    """A rollout of 8 videos, 4 micro-batches of 2, an optimizer step every 2: two steps a rollout."""
    gradients = Gradients()
    made = trainer(
        tmp_path,
        alive=True,
        per_device_train_batch_size=2,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        callbacks=[gradients],
    )
    made.train()
    assert len(logged(made, "reward")) == 2 and len(gradients.steps) == 4
    deviation = logged(made, "ratio/max_deviation")
    assert deviation[0] < 1e-5 and deviation[1] > 1e-5
    rows = [row for batch in made.scored.micro_batches for row in batch]
    assert sorted(rows) == list(range(8)) != rows  # shuffled


class ClipByHand(TrainerCallback):
    """At the second optimizer step on a rollout, the shares of all its videos and steps that are clipped."""

    trainer = low = high = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, rollout, steps = self.trainer, self.trainer.scored.samples, []
        made.policy.replay(rollout, range(len(rollout)), steps.append, grad=False)
        ratio = (torch.stack([step.log_prob for step in steps], 1) - rollout.log_probs).exp()
        advantage = made.scored.advantages[:, None]
        self.low = float(((ratio < 1 - args.epsilon) & (advantage < 0)).float().mean())
        self.high = float(((ratio > 1 + args.epsilon) & (advantage > 0)).float().mean())


def test_clip_ratios_are_shares_of_all_videos(tmp_path):
    """Videos without an advantage are skipped, and still count."""

    def not_all(prompts, videos, **columns):
        return [None if i in (1, 2, 6) else v for i, v in enumerate(brightness(prompts, videos).tolist())]

    by_hand = ClipByHand()
    by_hand.trainer = made = trainer(
        tmp_path,
        not_all,
        alive=True,
        per_device_train_batch_size=8,
        num_iterations=2,
        max_steps=2,
        epsilon=1e-6,
        callbacks=[by_hand],
    )
    made.train()
    low, high, region = (logged(made, f"clip_ratio/{name}_mean")[1] for name in ("low", "high", "region"))
    assert by_hand.low > 0 and by_hand.high > 0
    assert (low, high, region) == pytest.approx((by_hand.low, by_hand.high, by_hand.low + by_hand.high), abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "num_iterations": 3},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 3},
    ],
    ids=str,
)
def test_optimizer_steps_inside_a_rollouts_use(tmp_path, settings):
    """The ratio must be 1 only while the weights are those of the rollout."""
    made = trainer(tmp_path, alive=True, max_steps=4, replay_tolerance=1e-6, **settings)
    made.train()
    assert made.state.global_step == 4
    assert max(logged(made, "replay/max_log_prob_error")) <= 1e-6


# --- KL --------------------------------------------------------------------------------------------------------------


def zero(prompts, videos, **columns):
    """All advantages are 0: what is left is the KL."""
    return [0.0] * len(prompts)


@pytest.mark.parametrize("kl_space", ["x", "v"])
def test_kl_starts_at_zero_and_rises(tmp_path, kl_space):
    made = trainer(tmp_path, beta=0.01, kl_space=kl_space, max_steps=3)
    made.train()
    kl = logged(made, "kl")
    assert kl[0] == 0.0 and kl[1] > 0 and kl[2] > 0


@pytest.mark.parametrize("kl_space", ["x", "v"])
def test_kl_alone_pulls_back_to_the_reference(tmp_path, kl_space):
    """Its gradient is not lost: with equal rewards it is the only one."""
    gradients = Gradients()
    made = trainer(tmp_path, zero, alive=True, beta=1.0, kl_space=kl_space, max_steps=6, callbacks=[gradients])
    made.train()
    kl = logged(made, "kl")
    assert all(float(g.abs().max()) > 0 for g in gradients.steps[0].values())
    assert kl[-1] < 0.95 * kl[0]


def test_without_kl_equal_rewards_train_nothing(tmp_path):
    made = trainer(tmp_path, zero, alive=True, max_steps=1, weight_decay=0.0)
    before = weights(made)
    made.train()
    assert largest_difference(before, weights(made)) == 0
    assert logged(made, "frac_reward_zero_std") == [1.0] and logged(made, "loss") == [0.0]
    assert logged(made, "clip_ratio/region_mean") == [0.0]


def test_a_reward_may_be_called_max(tmp_path):
    def max_brightness(prompts, videos, **columns):
        return brightness(prompts, videos)

    made = trainer(tmp_path, max_brightness, alive=True, max_steps=2, logging_steps=2)
    made.train()
    (mean,) = logged(made, "rewards/max_brightness/mean")
    assert mean == pytest.approx(logged(made, "reward")[0])


def test_an_earlier_run_in_the_same_folder_is_set_aside(tmp_path):
    first = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    first.train()
    second = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    second.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert len(list((tmp_path / "earlier-1").glob("checkpoint-*"))) == 3
    resumed = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert not (tmp_path / "earlier-2").exists()


# --- options ---------------------------------------------------------------------------------------------------------


class WeightedByHand(TrainerCallback):
    """The gradient, in one graph, of the second optimizer step on a rollout, when the ratio is no longer 1."""

    trainer = gradient = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        made, rollout, steps, total = self.trainer, self.trainer.scored.samples, [], 0.0
        made.policy.replay(rollout, range(len(rollout)), steps.append)
        for k, step in enumerate(steps):
            log_ratio, weight = step.log_prob - rollout.log_probs[:, k], step.std / step.gain
            if args.step_weighting == "guard":
                moved = (step.mean - rollout.mean_rows(step.index, step.rows)).square().flatten(1).mean(1)
                log_ratio, weight = step.std * (log_ratio + moved / (2 * step.std**2)), 1 / step.step_size
            total = total - (weight * made.scored.advantages * log_ratio.exp()).sum()
        gradient = torch.autograd.grad(total / (len(rollout) * len(steps)), list(made.adapter.values()))
        self.gradient = dict(zip(made.adapter, gradient))


@pytest.mark.parametrize("kind", ["guard", "longcat"])
def test_step_weightings_after_the_first_step(tmp_path, kind):
    by_hand, gradients = WeightedByHand(), Gradients()
    by_hand.trainer = made = trainer(
        tmp_path / kind,
        alive=True,
        step_weighting=kind,
        num_iterations=2,
        max_steps=2,
        max_grad_norm=0.0,
        callbacks=[gradients, by_hand],
    )
    made.train()
    for name, expected in by_hand.gradient.items():
        scale = float(expected.abs().max())
        assert scale > 0 and float((gradients.steps[1][f"denoiser.{name}"] - expected).abs().max()) <= 1e-4 * scale


def test_step_weightings_differ(tmp_path):
    """The gradient of step k relative to unweighted is the step's weight."""
    norms = {}
    for kind in ("none", "guard", "longcat"):
        made = trainer(tmp_path / kind, alive=True, step_weighting=kind, max_steps=1)
        made.train()
        norms[kind] = torch.tensor([logged(made, f"grad_norm/step_{k}")[0] for k in (0, 1)])
        steps = []
        made.policy.replay(made.scored.samples, [0], steps.append, grad=False)
    std, gain, dt = (torch.stack([getattr(s, n) for s in steps]) for n in ("std", "gain", "step_size"))
    torch.testing.assert_close(norms["longcat"] / norms["none"], std / gain, rtol=1e-3, atol=0)
    # the guarded ratio's own gradient: std (d log p + 0), for m = m_old before the first step
    torch.testing.assert_close(norms["guard"] / norms["none"], std / dt, rtol=1e-3, atol=0)


class Seen:
    """A reward that keeps what it was given."""

    def __init__(self):
        self.prompts, self.videos, self.columns = [], [], []

    def __call__(self, prompts, videos, **columns):
        self.prompts.append(prompts), self.videos.append(videos.clone()), self.columns.append(columns)
        return brightness(prompts, videos)


def test_the_order_of_the_prompts_follows_seed_and_shuffle_dataset(tmp_path):
    made = trainer(tmp_path, data=prompts(6))

    def order(**settings):
        vars(made.args).update(settings)
        return list(made._get_train_sampler())[::4]  # a group has 4 videos

    assert order(shuffle_dataset=False) == list(range(6))
    first = order(shuffle_dataset=True, seed=1)
    assert sorted(first) == list(range(6)) != first and first == order(seed=1) != order(seed=2)


def test_shared_start_noise(tmp_path):
    made = trainer(tmp_path, share_initial_noise=True, per_device_train_batch_size=8, max_steps=1)
    made.train()
    seeds = made.scored.samples.noise_seeds
    assert [seeds.count(s) for s in seeds] == [4] * 8 and len(set(seeds)) == 2
    # without noise in the steps the videos of a group would be equal
    quiet = made.policy.sample(made.scored.samples.prompts, noise_seeds=seeds).videos
    assert torch.equal(quiet[0], quiet[3]) and not torch.equal(quiet[0], quiet[4])
    assert logged(made, "frac_reward_zero_std") == [0.0]  # the transitions' noise does
    apart = trainer(tmp_path / "apart", per_device_train_batch_size=8, max_steps=1)
    apart.train()
    assert len(set(apart.scored.samples.noise_seeds)) == 8


def test_noise_is_new_in_every_rollout_and_never_the_evaluations(tmp_path):
    seen = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.extend(made.scored.samples.noise_seeds)

    made = trainer(tmp_path, callbacks=[Keep()], max_steps=3, seed=42, eval_seed=42)
    made.train()
    assert len(set(seen)) == 12
    assert not set(seen) & {made.evaluator.noise(row) for row in range(100)}
    noise = made.evaluator.noise(0)
    made.args.eval_seed = 7
    assert made.evaluator.noise(0) != noise
    kinds = [sample_seed(*parts) for parts in ((1,), (1, 0), (1, 0, 0), (0, 1), (1, 1), (1, 2), (2, 1))]
    assert len(set(kinds)) == len(kinds)


def test_prompt_statistics_replace_the_groups(tmp_path):
    """The last 6 rewards of each prompt, of this rollout and the one before, give its mean and standard deviation."""
    rewards, advantages = [], []

    def kept(prompts, videos, **columns):
        rewards.append(brightness(prompts, videos))
        return rewards[-1]

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            advantages.append(made.scored.advantages)

    made = trainer(
        tmp_path,
        kept,
        data=prompts(2),
        per_device_train_batch_size=8,
        shuffle_dataset=False,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=6,
        per_prompt_stat_tracking_min_count=4,
        max_steps=2,
        callbacks=[Keep()],
    )
    made.train()
    assert {p: len(v) for p, v in made.prompt_statistics.state_dict().items()} == {"clip 0": 6, "clip 1": 6}
    seen = torch.stack(rewards).view(2, 2, 4)  # rollout, prompt, video
    for rollout, found in enumerate(advantages):
        last = seen[: rollout + 1].transpose(0, 1).flatten(1)[:, -6:]
        expected = (seen[rollout] - last.mean(1, keepdim=True)) / (last.std(1, correction=0, keepdim=True) + 1e-4)
        torch.testing.assert_close(found, expected.flatten().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_rewards": "group"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none", "advantage_clip": 1e6},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_advantages_follow_the_settings(tmp_path, settings):
    """Two weighted rewards of very different size and two groups, against the formulas written out."""
    given = {}

    def tiny(prompts, videos, **columns):
        given["tiny"] = 1e-2 * brightness(prompts, videos)
        return given["tiny"]

    def red(prompts, videos, **columns):
        given["red"] = torch.tensor(redness(prompts, videos), dtype=torch.float64)
        return given["red"]

    made = trainer(
        tmp_path, [tiny, red], reward_weights=[1.0, 0.5], max_steps=1, per_device_train_batch_size=8, **settings
    )
    made.train()
    row = made.state.log_history[0]
    assert row["reward"] == pytest.approx(row["rewards/tiny/mean"] + 0.5 * row["rewards/red/mean"], rel=1e-5)
    each, weights = torch.stack([given["tiny"], given["red"]], 1).view(2, 4, 2), torch.tensor([1.0, 0.5])
    total = (each * weights).sum(2)
    centred = total - total.mean(1, keepdim=True)
    normalised = ((each - each.mean(1, keepdim=True)) / (each.std(1, keepdim=True) + 1e-4) * weights).sum(2)
    expected = {
        "group": centred / (total.std(1, keepdim=True) + 1e-4),
        "batch": centred / (total.std() + 1e-4),
        "none": centred,
        "normalize_then_sum": normalised / (normalised.std() + 1e-4),
    }[next(iter(settings.values()))]
    torch.testing.assert_close(made.scored.advantages, expected.flatten().float(), rtol=1e-4, atol=1e-5)


def test_advantages_are_clamped(tmp_path):
    made = trainer(tmp_path, advantage_clip=0.25, max_steps=1)
    made.train()
    assert made.scored.advantages.abs().max() == 0.25


def test_none_means_does_not_apply(tmp_path):
    def sometimes(prompts, videos, **columns):
        values = brightness(prompts, videos).tolist()
        return [None, *values[1:]]

    def never(prompts, **columns):
        return [None] * len(prompts)

    made = trainer(tmp_path, [sometimes, never], max_steps=2, eval_dataset=prompts(2))
    made.train()
    assert made.scored.advantages[0] == 0 and (made.scored.advantages[1:] != 0).all()
    assert all(p.isfinite().all() for p in made.adapter.values())
    saved = json.loads((tmp_path / "evaluations" / "step_000000.json").read_text())["sets"]["eval"]["scores"]
    assert saved["reward"][0] is None and saved["rewards/never"] == [None, None]


def test_async_rewards_run_together(tmp_path):
    arrived = []

    def member(name):
        async def reward(prompts, videos, **columns):
            arrived.append(name)
            while len(arrived) % 2:  # alone, this would never end
                await asyncio.sleep(0.001)
            return brightness(prompts, videos)

        reward.__name__ = name
        return reward

    made = trainer(tmp_path, [member("one"), member("two")], max_steps=1)
    made.train()
    row = made.state.log_history[0]
    assert row["rewards/one/mean"] == row["rewards/two/mean"] and sorted(arrived) == ["one", "two"]


def test_columns_reach_the_rewards_in_order(tmp_path):
    reward = Seen()
    data = Dataset.from_dict({"prompt": ["a", "b", "c"], "n": [1, 2, 3], "scene": [{"x": 1}, {"x": 2}, {"x": 3}]})
    made = trainer(tmp_path, reward, data, per_device_train_batch_size=8, max_steps=2, eval_dataset=data)
    made.train()
    for batch, columns in zip(reward.prompts, reward.columns):
        assert columns["n"] == ["abc".index(p) + 1 for p in batch]
        assert columns["scene"] == [{"x": n} for n in columns["n"]]
        assert columns["trainer_state"] is not None
    for videos in reward.videos:
        assert videos.dtype == torch.float32 and videos.shape[1:] == (5, 3, 16, 16)
        assert 0 <= videos.min() and videos.max() <= 1


def test_extras_and_metrics_are_logged(tmp_path):
    def reward(prompts, videos, log_extra, log_metric, **columns):
        values = brightness(prompts, videos)
        log_extra("double", 2 * values)
        log_extra("word", ["x"] * len(prompts))
        log_metric("calls", 1.0)
        return values

    made = trainer(tmp_path, reward, max_steps=1, eval_dataset=prompts(2))
    made.train()
    row = next(r for r in made.state.log_history if "reward" in r)
    assert row["double/mean"] == pytest.approx(2 * row["reward"]) and row["calls"] == 1.0
    assert logged(made, "eval_double/mean")[0] == pytest.approx(2 * logged(made, "eval_reward")[0])
    assert logged(made, "eval_calls")[0] == 1.0


def test_the_correlation_of_rewards_within_groups_is_logged(tmp_path):
    def dark(prompts, videos, **columns):
        offsets = torch.tensor([1000.0 * int(prompt[-1]) for prompt in prompts])  # between groups it says nothing
        return offsets - 2 * brightness(prompts, videos)

    def same(prompts, videos, **columns):
        return [0.1] * len(prompts)

    made = trainer(tmp_path, [brightness, dark, same], max_steps=1, per_device_train_batch_size=8)
    made.train()
    (row,) = [r for r in made.state.log_history if "reward" in r]
    found = {key: value for key, value in row.items() if key.startswith("reward_correlation/")}
    assert found == {"reward_correlation/brightness/dark": pytest.approx(-1, abs=1e-3)}


def test_judges_never_influence_training(tmp_path):
    torch_draws = []

    def judge(prompts, videos, **columns):
        torch_draws.append(torch.rand(7))  # even if it uses up random numbers
        return redness(prompts, videos)

    results = []
    for name, judges in (("with", [judge]), ("without", None)):
        made = trainer(
            tmp_path / name,
            alive=True,
            max_steps=2,
            eval_dataset=prompts(2),
            judges=judges,
            eval_strategy="steps",
            eval_steps=1,
        )
        made.train()
        results.append(weights(made))
    assert largest_difference(*results) == 0 and len(torch_draws) == 3
    made = trainer(tmp_path / "rewards", judges=[redness], eval_dataset=prompts(2), max_steps=1)
    made.train()
    assert "eval_judges/redness/mean" in made.state.log_history[0]
    assert not any("judges" in key for row in made.state.log_history if "reward" in row for key in row)


def test_a_second_train_draws_a_new_rollout(tmp_path):
    """It starts a new schedule from the trained weights, even if the first train() left a rollout half used."""
    made, rollouts = trainer(tmp_path, max_steps=1, num_iterations=2), []
    for _ in range(2):
        before = weights(made)
        made.train()
        rollouts.append(set(made.scored.samples.noise_seeds))
        assert made.state.global_step == 1 and largest_difference(before, weights(made)) > 0
    assert not rollouts[0] & rollouts[1]


# --- the average of the adapter --------------------------------------------------------------------------------------


def test_the_average_is_saved_and_evaluated(tmp_path):
    trail = []

    class Trail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trail.append(weights(made))

    made = trainer(
        tmp_path,
        ema_decay=0.9,
        max_steps=3,
        callbacks=[Trail()],
        eval_dataset=prompts(2),
        save_strategy="steps",
        save_steps=3,
    )
    average = weights(made)
    made.train()
    for n, current in enumerate(trail, start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = {k: decay * average[k] + (1 - decay) * current[k] for k in average}
    assert largest_difference(average, made.ema.average) < 1e-6
    assert largest_difference(weights(made), trail[-1]) == 0  # outside, the adapter is the trained one
    made.save_model()
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    averages = {name.replace(".default", ""): value for name, value in made.ema.average.items()}
    assert largest_difference(averages, saved) == 0
    checkpoint = load_file(tmp_path / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    assert largest_difference(averages, checkpoint) == 0
    with made.ema:
        rows = made.evaluator.evaluate("eval", made.eval_dataset, made.state).scores["reward"]
    last = json.loads((tmp_path / "evaluations" / "step_000003.json").read_text())["sets"]["eval"]["scores"]["reward"]
    assert rows == last


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_deterministic_and_does_not_depend_on_the_batch(tmp_path):
    data = Dataset.from_dict({"prompt": [f"clip {i % 3}" for i in range(5)]})
    results = []
    for size in (5, 5, 2, 1):
        made = trainer(tmp_path, alive=True, eval_dataset=data, per_device_eval_batch_size=size, num_sample_videos=0)
        first = made.evaluate()
        assert made.evaluate() == first
        results.append(made.last_evaluation["eval"]["scores"]["reward"])
    assert results[0] == results[1] and len(set(results[0])) == 5
    for other in results[2:]:
        assert other == pytest.approx(results[0], abs=1e-4 * 1000)  # brightness is in thousandths
    assert made.evaluate(data.select(range(2)))["eval_reward"] == pytest.approx(sum(results[0][:2]) / 2, abs=0.1)


def test_several_evaluation_sets(tmp_path):
    def only_even(prompts, videos, even, **columns):
        return [v if e else None for v, e in zip(brightness(prompts, videos).tolist(), even)]

    sets = {"a": prompts(2, even=[True, True]), "none": prompts(3, even=[False] * 3)}
    made = trainer(tmp_path, only_even, prompts(3, even=[True] * 3), eval_dataset=sets, judges=redness, max_steps=1)
    made.train()
    metrics = made.state.log_history[0]
    assert {"eval_a_reward", "eval_reward", "eval_none_judges/redness/mean"} <= metrics.keys()
    assert "eval_none_reward" not in metrics and metrics["eval_reward"] == metrics["eval_a_reward"]
    assert (tmp_path / "samples" / "before_after_a.png").exists()


def test_the_best_model_has_the_highest_reward(tmp_path):
    def falling(prompts, videos, trainer_state, **columns):
        return [-float(trainer_state.global_step)] * len(prompts)

    made = trainer(
        tmp_path,
        [brightness, falling],
        reward_weights=[1e-9, 1.0],
        eval_dataset=prompts(2),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        num_sample_videos=0,
    )
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-1")
    first = trainer(tmp_path / "one", [brightness, falling], reward_weights=[1e-9, 1.0], max_steps=1)
    first.train()
    assert largest_difference(weights(made), weights(first)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    evaluation = json.loads((tmp_path / "evaluations" / "step_000001.json").read_text())["sets"]["eval"]["scores"]
    assert report["to_step"] == 1
    assert report["comparison"]["eval"]["reward"]["after"] == pytest.approx(sum(evaluation["reward"]) / 2)


def test_the_best_model_is_what_an_average_saves(tmp_path):
    def falling(prompts, videos, trainer_state, **columns):
        return [-float(trainer_state.global_step)] * len(prompts)

    made = trainer(
        tmp_path,
        [brightness, falling],
        reward_weights=[1e-9, 1.0],
        eval_dataset=prompts(2),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        num_sample_videos=0,
        ema_decay=0.5,
    )
    made.train()
    made.save_model()
    name = "pytorch_lora_weights.safetensors"
    assert largest_difference(load_file(tmp_path / name), load_file(tmp_path / "checkpoint-1" / name)) == 0


# --- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: evaluation before, between and after, checkpoints, the adapter at the root."""
    folder = tmp_path_factory.mktemp("run")
    made = trainer(
        folder,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        judges=redness,
        log_completions=True,
        learning_rate=3e-2,
        eval_dataset={"seen": prompts(3), "new": Dataset.from_dict({"prompt": ["other 0", "other 1"]})},
    )
    made.train()
    made.save_model()
    return made, folder


def test_files_of_a_run(finished):
    made, folder = finished
    assert sorted(p.name for p in (folder / "evaluations").iterdir()) == [
        "step_000000.json",
        "step_000002.json",
        "step_000004.json",
    ]
    for step in (0, 2, 4):
        for name, count in (("seen", 2), ("new", 2)):
            place = folder / "samples" / f"step_{step:06d}" / name
            assert sorted(p.name for p in place.iterdir()) == [
                *(f"{i:03d}.mp4" for i in range(count)),
                "rewards.json",
                "sheet.png",
            ]
            rewards = json.loads((place / "rewards.json").read_text())
            assert len(rewards["prompts"]) == count == len(rewards["scores"]["reward"])
    assert {p.name for p in (folder / "samples").glob("*.png")} == {"before_after_seen.png", "before_after_new.png"}
    assert {p.name for p in (folder / "samples").glob("rollout_*")} == {f"rollout_{i:06d}" for i in range(4)}
    assert tiny_runs.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    assert (folder / "README.md").exists() and (folder / "pytorch_lora_weights.safetensors").exists()
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".tmp")]
    assert not list(folder.glob(".incomplete-*"))


def test_the_report(finished):
    made, folder = finished
    report = json.loads((folder / "report.json").read_text())
    assert (report["from_step"], report["to_step"]) == (0, 4)
    before = json.loads((folder / "evaluations" / "step_000000.json").read_text())["sets"]
    after = json.loads((folder / "evaluations" / "step_000004.json").read_text())["sets"]
    for name in ("seen", "new"):
        row = report["comparison"][name]["reward"]
        first, last = (torch.tensor(e[name]["scores"]["reward"], dtype=torch.double) for e in (before, after))
        assert row["n"] == len(first)
        assert row["difference"] == pytest.approx(float((last - first).mean()))
        assert row["low"] <= row["difference"] <= row["high"]
        assert "judges/redness" in report["comparison"][name]
    text = (folder / "report.md").read_text()
    assert "| seen | reward | 3 |" in text and "| new | judges/redness | 2 |" in text


def test_the_card_samples_as_the_run_did(finished):
    made, folder = finished
    assert "num_inference_steps=3" in (folder / "README.md").read_text()


def test_the_adapter_loads_into_plain_diffusers(finished):
    made, folder = finished
    fresh, base = pipeline(), pipeline()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Nn]o LoRA keys.*")
        fresh.load_lora_weights(folder)
    call = {
        **tiny_runs.CALL,
        "prompt": "clip 0",
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    latents = [
        pipe(**call, generator=torch.Generator().manual_seed(1)).frames for pipe in (fresh, made.pipeline, base)
    ]
    assert isinstance(fresh, WanPipeline)
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-5, atol=1e-5)
    assert float((latents[0] - latents[2]).abs().max()) > 1e-3


def test_rollout_samples_are_the_trained_ones(finished):
    _, folder = finished
    saved = json.loads((folder / "samples" / "rollout_000000" / "rewards.json").read_text())
    assert len(saved["prompts"]) == 2 and len(saved["scores"]["brightness"]) == 2


def test_another_evaluation_set_does_not_break_the_end_of_a_run(tmp_path):
    """The first evaluation in output_dir may be of a run with other prompts: nothing to compare, nothing lost."""
    first = trainer(tmp_path, max_steps=1, eval_dataset=prompts(2), save_strategy="steps", save_steps=1)
    first.train()
    second = trainer(tmp_path, max_steps=2, eval_dataset={"other": prompts(3)})
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2


def test_default_config():
    """As in TRL, `args` may be left out."""
    with pytest.raises(ValueError, match="train_dataset has only 1|must be a diffusers pipeline"):
        VideoGRPOTrainer(None, brightness, train_dataset=prompts(1))
    assert VideoGRPOConfig().num_generations == 8
