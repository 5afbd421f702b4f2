"""Reward backpropagation: its gradient, its ways, its errors, and what it shares with every trainer."""

import warnings

import pytest
import tiny_runs
import torch

from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer, RewardError
from pisces_rl.policy import default_lora_config
from pisces_rl.trainers.backprop.backprop_config import THROUGH


def bright(prompts, videos, **columns):
    return 10 * (videos - 0.5).mean(dim=(1, 2, 3, 4))


def red(prompts, videos, **columns):
    return (2 * videos[:, :, 0] - videos[:, :, 1]).mean(dim=(1, 2, 3))


bright.differentiable = red.differentiable = True


def config(folder, **settings) -> RewardBackpropConfig:
    defaults = {
        **tiny_runs.CALL,
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "num_inference_steps": 3,
        "gradient_checkpointing": False,
        "pipeline_kwargs": {"max_sequence_length": 16},
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "num_sample_videos": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RewardBackpropConfig(**defaults | settings)


def trainer(folder, rewards=bright, prompts: int = 4, callbacks=None, eval_dataset=None, **settings):
    made = RewardBackpropTrainer(
        tiny_runs.pipeline(),
        rewards,
        config(folder, **settings),
        tiny_runs.prompts(prompts),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=default_lora_config(4),
    )
    tiny_runs.enliven(made)
    return made


@pytest.mark.parametrize("through", THROUGH)
def test_every_way_raises_the_reward(tmp_path, through):
    made = trainer(tmp_path, backprop_through=through, max_steps=8, prompts=2)
    made.train()
    rewards = tiny_runs.logged(made, "reward")
    assert len(rewards) == 8 and rewards[-1] > rewards[0]
    row = made.state.log_history[0]
    assert {"loss", "step_time", "reward_std", "rewards/bright/mean", "rewards/bright/grad_norm"} <= row.keys()
    assert row["loss"] == pytest.approx(-row["reward"], rel=1e-4)


def test_the_step_is_the_gradient_of_the_weighted_mean_reward(tmp_path):
    seen = tiny_runs.Gradients()
    made = trainer(tmp_path, [bright, red], callbacks=[seen], max_steps=1, reward_weights=[1.0, -3.0])
    calls, sample = [], made.policy.sample_with_gradients
    made.policy.sample_with_gradients = lambda prompts, **k: calls.append((prompts, k)) or sample(prompts, **k)
    start = tiny_runs.weights(made)
    made.train()
    with torch.no_grad():
        for name, parameter in made.adapter.items():
            parameter.copy_(start[name])
    ((prompts, kwargs),) = calls
    videos = sample(prompts, **kwargs)
    loss = -(bright(prompts, videos) - 3 * red(prompts, videos)).mean()
    expected = torch.autograd.grad(loss, list(made.adapter.values()))
    own = list(seen.steps[0].values())
    assert len(own) == len(expected)
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    row = made.state.log_history[0]
    cosine = (2 - 1) / (3 * 5) ** 0.5  # of (1, 1, 1) and (2, -1, 0), in every pixel
    assert row["grad_cosine/bright/red"] == pytest.approx(cosine)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_accumulated_batches_are_one_batch(tmp_path):
    results = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = trainer(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            checkpoint_decoder=False,
        )
        made.train()
        results.append(tiny_runs.weights(made))
    assert tiny_runs.largest_difference(results[0], results[1]) < 1e-5
    assert tiny_runs.largest_difference(results[0], results[2]) < 1e-5


def test_checkpointed_activations_change_nothing(tmp_path):
    results = []
    for on in (False, True):
        made = trainer(
            tmp_path / str(on),
            gradient_checkpointing=on,
            checkpoint_decoder=on,
            backprop_steps=2,
            optim="sgd",
            learning_rate=1.0,
        )
        made.train()
        results.append(tiny_runs.weights(made))
    assert tiny_runs.largest_difference(*results) < 1e-6


@pytest.mark.parametrize("through", ["random_steps", pytest.param("low_variance", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, through):
    settings = dict(max_steps=4, backprop_through=through, scale_rewards="std", rewards=[bright, red])
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    trainer(tmp_path / "cut", callbacks=[tiny_runs.StopAt(2)], **settings).train()
    resumed = trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert tiny_runs.largest_difference(tiny_runs.weights(whole), tiny_runs.weights(resumed)) == 0
    torch.testing.assert_close(whole.reward_std, resumed.reward_std)


def test_rewards_scaled_by_their_spread(tmp_path):
    made = trainer(tmp_path, [bright, red], scale_rewards="std", max_steps=3)
    assert torch.equal(made._scale(), torch.ones(2))
    made.train()
    assert (made.reward_std > 0).all() and torch.equal(made._scale(), made.reward_std.clamp_min(1e-4))


def test_the_step_with_scaled_rewards_is_the_gradient_of_their_scaled_sum(tmp_path):
    seen = tiny_runs.Gradients()
    made = trainer(tmp_path, [bright, red], callbacks=[seen], max_steps=1, scale_rewards="std")
    made.reward_std = torch.tensor([2.0, 0.5])
    calls, sample = [], made.policy.sample_with_gradients
    made.policy.sample_with_gradients = lambda *a, **k: calls.append((a, k)) or sample(*a, **k)
    start = tiny_runs.weights(made)
    made.train()
    for name, parameter in made.adapter.items():
        parameter.data.copy_(start[name])
    (((prompts,), kwargs),) = calls
    videos = sample(prompts, **kwargs)
    loss = -(bright(prompts, videos) / 2.0 + red(prompts, videos) / 0.5).mean()
    expected = torch.autograd.grad(loss, list(made.adapter.values()))
    for a, b in zip(seen.steps[0].values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_resuming_with_another_reward_keeps_the_spread_of_those_that_stay(tmp_path):
    settings = dict(max_steps=2, scale_rewards="std", save_strategy="steps", save_steps=2)
    first = trainer(tmp_path, red, **settings)
    first.train()
    other = trainer(tmp_path, [bright, red], **settings)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert other.reward_std[0].isnan() and other.reward_std[1] == first.reward_std[0]
    assert other._scale()[0] == 1


def test_the_checkpoint_of_the_other_trainer(tmp_path):
    trainer(tmp_path / "ours", callbacks=[tiny_runs.StopAt(1)]).train()
    tiny_runs.trainer(tmp_path / "grpo", callbacks=[tiny_runs.StopAt(1)]).train()
    with pytest.raises(ValueError, match="is a run of Video GRPO, not of Reward Backpropagation: resume it with"):
        trainer(tmp_path / "grpo").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is a run of Reward Backpropagation, not of Video GRPO"):
        tiny_runs.trainer(tmp_path / "ours").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("through", [THROUGH[0], *(pytest.param(t, marks=pytest.mark.slow) for t in THROUGH[1:])])
def test_a_model_of_one_step(tmp_path, through):
    made = trainer(tmp_path, backprop_through=through, num_inference_steps=1, eval_dataset=tiny_runs.prompts(1))
    made.train()
    assert made.state.global_step == 2 and all(norm > 0 for norm in tiny_runs.logged(made, "grad_norm"))


def test_a_part_of_the_frames(tmp_path):
    shapes = []

    def watched(prompts, videos, **columns):
        shapes.append(tuple(videos.shape))
        return bright(prompts, videos)

    watched.differentiable = True
    trainer(tmp_path, watched, decode_frames=1, max_steps=1).train()
    assert shapes == [(2, 1, 3, 16, 16)]


def test_evaluation_report_and_adapter(tmp_path):
    made = trainer(tmp_path, eval_dataset=tiny_runs.prompts(2), max_steps=3)
    made.train()
    made.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "Reward Backpropagation" in card and "GRPO" not in card and "through the last 1 of 3 steps" in card
    assert made.last_evaluation["eval"]["scores"]["reward"] != made.first_evaluation["eval"]["scores"]["reward"]


def test_rewards_without_gradients(tmp_path):
    async def later(prompts, videos, **columns):
        return bright(prompts, videos)

    later.differentiable = True
    with pytest.raises(ValueError, match=r"rewards \['later'\] are async, .* with def instead of .* VideoGRPOTrainer"):
        trainer(tmp_path, [bright, later])
    with pytest.raises(ValueError, match=r"rewards \['brightness'\] are not differentiable.*VideoGRPOTrainer"):
        trainer(tmp_path, [bright, tiny_runs.brightness])

    def cut(prompts, videos, **columns):
        return bright(prompts, videos.detach())

    def listed(prompts, videos, **columns):
        return bright(prompts, videos).tolist()

    def steep(prompts, videos, **columns):
        return (videos - videos).sqrt().sum(dim=(1, 2, 3, 4))

    def raises(prompts, videos, **columns):
        raise KeyError("weights")

    for func, message in (
        (cut, "not connected to the videos"),
        (listed, "returned a list that is not connected"),
        (steep, "has a NaN or infinite gradient"),
        (raises, "'raises' raised KeyError"),
    ):
        func.differentiable = True
        with pytest.raises(RewardError, match=message):
            trainer(tmp_path, func, max_steps=1).train()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(backprop_through="all"), "backprop_through='all'"),
        (dict(backprop_steps=0), "backprop_steps=0"),
        (dict(backprop_steps=4), "backprop_steps=4"),
        (dict(low_variance_samples=0), "low_variance_samples=0"),
        (dict(decode_frames=0), "decode_frames=0"),
        (dict(one_step_range=[2, 2]), r"one_step_range=\[2, 2\]"),
        (dict(one_step_range=[1]), r"one_step_range=\[1\]"),
        (dict(scale_rewards="group"), "scale_rewards='group'"),
        (dict(reward_std_decay=1.0), "reward_std_decay=1.0"),
        (dict(fp16=True), "fp16=True"),
        (dict(num_inference_steps=0), "num_inference_steps=0"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_too_few_prompts(tmp_path):
    with pytest.raises(ValueError, match="an optimizer step takes 4 different prompts"):
        trainer(tmp_path, prompts=3, gradient_accumulation_steps=2)
