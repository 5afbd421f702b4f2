"""Rewards without information: equal within a group, equal but for rounding, far from zero, missing.

Such cases come from runs whose reward saturates: binary rewards, verifiers that everything passes, scores with a large
offset. A group of equal rewards must not move a weight.
"""

import math

import pytest
import torch
from datasets import Dataset
from trainers.tiny_runs import (
    StopAt,
    brightness,
    config,
    largest_difference,
    logged,
    prompts,
    trainer,
    weights,
)

from pisces_rl.trainers.rollouts.advantages import PromptStatistics, group_advantages, nanstd

MODES = [
    ("group", "sum_then_normalize"),
    ("batch", "sum_then_normalize"),
    ("none", "sum_then_normalize"),
    ("group", "normalize_then_sum"),
]
EQUAL = [123.456, 0.1, -0.3, 1e6 + 0.1, 1e-8, 3e38]


def advantages(values, weight=(1.0,), size=12, mode=MODES[0]):
    values = torch.as_tensor(values)
    values = values[:, None] if values.ndim == 1 else values
    return group_advantages(values, torch.tensor(weight), size, scale_rewards=mode[0], aggregation=mode[1])


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("value", EQUAL)
def test_equal_rewards_have_no_advantage(value, mode):
    """Twelve rewards of 123.456 had advantages of -.13: the mean was rounded in fp32."""
    found, _, std = advantages([value] * 12, mode=mode)
    assert found.tolist() == [0.0] * 12 and std.tolist() == [0.0] * 12
    assert nanstd(torch.tensor([value] * 12)) == 0


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_equal_rewards_next_to_a_group_that_differs(mode):
    """Also where the whole batch is normalised, and with a second reward and its weight."""
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([torch.full((24,), 123.456), torch.full((24,), 0.7)], 1)
    values[12:] += torch.randn(12, 2, generator=generator)
    found = advantages(values, (0.3, 1.1), mode=mode)[0]
    assert found[:12].tolist() == [0.0] * 12 and found[12:].abs().min() > 0


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_rounding_differences_give_no_advantage(mode):
    """A mean over pixels differs in its last bits with the place in a batch; 1e6 leaves .06 between neighbours."""
    for value in (123.456, -0.3, 1e6):
        up = torch.nextafter(torch.tensor(value), torch.tensor(math.inf))
        values = torch.tensor([value, float(up)] * 6)
        assert values[0] != values[1]
        assert advantages(values, mode=mode)[0].tolist() == [0.0] * 12 and nanstd(values) == 0
    cancelled = torch.stack([values, -values.flip(0)], 1)  # two rewards whose sum is rounding
    assert advantages(cancelled, (1.0, 1.0), mode=mode)[0].tolist() == [0.0] * 12


def test_a_small_difference_on_a_large_offset_is_a_signal():
    """1e6 + 0, 1, 2, 3: fp64 keeps what fp32 had lost."""
    values = torch.tensor([0.0, 1, 2, 3])
    torch.testing.assert_close(advantages(values + 1e6, size=4)[0], advantages(values, size=4)[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(nanstd(values + 1e6), nanstd(values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_equal_rewards_with_a_hole_and_in_half_precision(mode):
    """One sample to which the reward does not apply; values in fp16."""
    values = torch.tensor([123.456] * 5 + [math.nan] + [123.456] * 6)
    assert advantages(values, mode=mode)[0].tolist() == [0.0] * 12
    assert advantages(torch.tensor([0.1] * 12, dtype=torch.float16), mode=mode)[0].tolist() == [0.0] * 12
    alone = torch.tensor([math.nan] * 11 + [5.0])
    assert advantages(alone, mode=mode)[0].tolist() == [0.0] * 12


def test_equal_rewards_in_running_statistics():
    """A known prompt, a new one, and one whose first reward the buffer has dropped."""
    for value in EQUAL:
        statistics = PromptStatistics(buffer_size=16, min_count=12)
        for _ in range(3):
            rewards = torch.tensor([value] * 12)
            assert statistics.advantages(["x"] * 12, rewards).tolist() == [0.0] * 12
            assert statistics.advantages(["y"] * 2, rewards[:2]).tolist() == [0.0] * 2
    statistics = PromptStatistics(buffer_size=2, min_count=2)
    found = statistics.advantages(["x"] * 3, torch.tensor([1.0, 2.0, 2.0]))
    assert found[0] < 0 and found[1:].tolist() == [0.0, 0.0]


def constant(prompts, videos, **columns):
    return [123.456] * len(prompts)


def test_weights_do_not_move(tmp_path):
    """Three steps of Adam moved weights by 1.7e-3 on twelve equal rewards."""
    made = trainer(tmp_path, constant, num_generations=12, per_device_train_batch_size=12, max_steps=3, alive=True)
    before = weights(made)
    made.train()
    assert largest_difference(before, weights(made)) == 0
    assert logged(made, "frac_reward_zero_std") == [1.0] * 3 and logged(made, "reward_std") == [0.0] * 3
    assert logged(made, "rewards/constant/std") == [0.0] * 3


# --- running statistics of prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [{"scale_rewards": "batch"}, {"scale_rewards": "none"}, {"multi_objective_aggregation": "normalize_then_sum"}],
)
def test_settings_that_running_statistics_would_ignore(tmp_path, setting):
    """per_prompt_stat_tracking used the prompt's own deviation and ignored scale_rewards."""
    (name,) = setting
    with pytest.raises(ValueError, match=f"per_prompt_stat_tracking=True uses .* so {name}=.*; set {name}="):
        config(tmp_path, per_prompt_stat_tracking=True, **setting)


def test_a_resume_inside_a_rollout(tmp_path):
    """The rollout was drawn again under newer weights, and its rewards entered the statistics twice."""
    settings = {
        "max_steps": 4,
        "num_iterations": 2,
        "per_prompt_stat_tracking": True,
        "rollout_batch_size": 3,
        "per_prompt_stat_tracking_min_count": 2,
        "per_prompt_stat_tracking_buffer_size": 6,
    }
    calls = []

    def counted(prompts, videos, **columns):
        calls.append(len(prompts))
        return brightness(prompts, videos)

    whole = trainer(tmp_path / "whole", counted, prompts(2), **settings)
    whole.train()
    expected, calls[:] = list(calls), []
    broken = trainer(tmp_path / "broken", counted, prompts(2), callbacks=[StopAt(3)], **settings)  # between uses
    broken.train()
    resumed = trainer(tmp_path / "broken", counted, prompts(2), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and calls == expected
    assert resumed.prompt_statistics.state_dict() == whole.prompt_statistics.state_dict()
    assert largest_difference(weights(whole), weights(resumed)) == 0
    for name in ("reward", "loss", "ratio/mean"):
        assert logged(whole, name) == logged(resumed, name)


@pytest.mark.parametrize("change", [{"seed": 7}, {"num_inference_steps": 4}, {"other_prompts": True}])
def test_a_changed_run_resumed_inside_a_rollout_scores_it_anew(tmp_path, change):
    """The advantages of other videos were silently reused."""
    settings, calls = {"max_steps": 4, "num_iterations": 2, "per_prompt_stat_tracking": True}, []

    def counted(prompts, videos, **columns):
        calls.append(len(prompts))
        return brightness(prompts, videos)

    broken = trainer(tmp_path, counted, prompts(1), callbacks=[StopAt(3)], **settings)
    broken.train()
    data = Dataset.from_dict({"prompt": ["another"]}) if change.pop("other_prompts", False) else prompts(1)
    resumed, calls[:] = trainer(tmp_path, counted, data, **settings | change), []
    resumed.train(resume_from_checkpoint=True)
    assert calls == [4]
    entered = sum(len(rewards) for rewards in resumed.prompt_statistics.state_dict().values())
    assert entered == 8  # of two rollouts, not of three


def test_a_constant_reward_does_not_drown_a_small_one():
    """A = 10,000 in all rows and B = .001 to .004 gave advantages of 0."""
    small = torch.tensor([0.001, 0.002, 0.003, 0.004])
    values = torch.stack([torch.full((4,), 1e4), small], 1)
    both = group_advantages(values, torch.ones(2), 4)[0]
    alone = group_advantages(small[:, None], torch.ones(1), 4)[0]
    assert torch.allclose(both, alone, atol=1e-6) and both.abs().max() > 0.5
