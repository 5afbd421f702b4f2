"""Settings and data that a method cannot use: a ValueError before anything is loaded."""

from dataclasses import fields

import pytest
from datasets import Dataset
from tiny_runs import config, prompts, trainer

from pisces_rl.trainers.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_generations": 1}, "num_generations=1: advantages need at least 2 videos per prompt"),
        ({"beta": -0.1}, "beta=-0.1 must "),
        ({"scale_rewards": "std"}, "scale_rewards='std' (must be one of|is not supported)"),
    ],
)
def test_what_no_method_can_use(tmp_path, method, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, method, **settings)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("nft", {"mixture": 0.0}, "mixture=0.0 must be positive: the loss divides by it"),
        ("nft", {"mixture": -1.0}, "mixture=-1.0 must be positive"),
        ("nft", {"mixture": float("nan")}, "mixture=nan must be positive"),
        ("nft", {"contrast": 0.0}, "contrast=0.0 must be positive: the loss divides by it"),
        ("nft", {"old_decay_max": 1.0}, r"old_decay_max=1.0 must lie in \[0, 1\): at 1 the old policy would"),
        ("nft", {"old_decay_rate": -0.1}, "old_decay_rate=-0.1 .*must not be negative"),
        ("nft", {"old_decay_start": -1}, "old_decay_start=-1 must not be negative"),
        ("awm", {"power": 0.0}, "power=0.0 and epsilon=1.0 must be positive"),
        ("awm", {"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ("awm", {"average_weight": -1.0}, "average_weight=-1.0 must not be negative; 0 disables the term"),
        ("awm", {"average_decay_max": 1.0}, r"average_decay_max=1.0 must lie in \[0, 1\)"),
        ("rvm", {"reward_scale": 0.0}, "reward_scale=0.0 must be positive"),
        ("flow_dpo", {"beta": 0.0}, "beta=0.0 must be positive: it scales the preference"),
        ("flow_dpo", {"sft_weight": -0.1}, "sft_weight=-0.1 must not be negative"),
        (
            "flow_dpo",
            {"per_device_train_batch_size": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size=2 must be a multiple of num_generations=4: the two videos of a pair",
        ),
        ("flow_dppo", {"divergence_limit": 0.0}, "divergence_limit=0.0 must be positive"),
        ("flow_dppo", {"step_weighting": "guard"}, "step_weighting='guard' normalises ratios for a clip"),
        ("nft", {"train_schedule_steps": 0}, "train_schedule_steps=0 must be at least 1, or unset"),
        ("awm", {"train_levels": 4}, "train_levels=4 must lie between 1 and 3, the steps of the schedule"),
        ("rvm", {"train_levels": 0}, "train_levels=0 must lie between 1 and 3"),
    ],
)
def test_settings_of_one_method(tmp_path, method, settings, message):
    with pytest.raises(ValueError, match=message):
        made = config(tmp_path, method, **settings)
        made.settle_call({})  # the model decides the number of steps


@pytest.mark.parametrize("method", ["awm", "rvm", "nft"])
def test_an_anchor_of_zero_is_no_anchor(tmp_path, method):
    """A reference with weight 0 is not evaluated."""
    made = trainer(tmp_path, method=method, beta=0.0, max_steps=1)
    made.train()
    assert "reference" not in made.compared(made.scored)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "data, message",
    [
        (Dataset.from_dict({"text": ["a"] * 3}), r"train_dataset has columns \['text'\] but none named `prompt`"),
        (None, "train_dataset is a NoneType; pass a datasets.Dataset"),
        (Dataset.from_dict({"prompt": ["a", None]}), "train_dataset row 1: prompt is None"),
    ],
    ids=["columns", "none", "prompt"],
)
def test_a_data_set_without_prompts(tmp_path, method, data, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method][0]("no such model", lambda prompts, videos, **columns: [0.0], config(tmp_path, method), data)


@pytest.mark.parametrize("method", METHODS)
def test_no_rewards(tmp_path, method):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        METHODS[method][0]("no such model", None, config(tmp_path, method), prompts())


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("flow_dppo", {"epsilon": 0.2}, "epsilon=0.2 is not supported: Flow-DPPO .*divergence_limit"),
        ("flow_dppo", {"epsilon_high": 0.3}, "epsilon_high=0.3 is not supported: Flow-DPPO .*divergence_limit"),
        ("flow_dpo", {"advantage_clip": 5.0}, "advantage_clip=5.0 is not supported: .*the order of a group's rewards"),
        ("flow_dpo", {"scale_rewards": "batch"}, "scale_rewards='batch' is not supported: .*the order of a group's"),
        (
            "grpo",
            {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' divides .*scale_rewards='none' would have no effect",
        ),
        (
            "rvm",
            {"scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' divides .*scale_rewards='group' would have no effect",
        ),
        (
            "grpo",
            {"scale_rewards": "batch", "per_prompt_stat_tracking": True},
            "per_prompt_stat_tracking=True uses .*scale_rewards='batch' would have no effect",
        ),
    ],
)
def test_a_setting_that_would_have_no_effect(tmp_path, method, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, method, **settings)


@pytest.mark.parametrize(
    "method, settings",
    [
        ("flow_dppo", {"epsilon": 1e-3, "epsilon_high": None}),
        ("flow_dpo", {"scale_rewards": True}),
        ("rvm", {"multi_objective_aggregation": "normalize_then_sum"}),
        ("rvm", {"per_prompt_stat_tracking": True}),
    ],
)
def test_its_default_passes(tmp_path, method, settings):
    config(tmp_path, method, **settings)


def test_only_methods_with_noise_in_their_steps_may_share_the_start_noise():
    """Without it all videos of a group would be equal."""
    has = {name for name, (_, cls) in METHODS.items() if "share_initial_noise" in {f.name for f in fields(cls)}}
    assert has == {"grpo", "flash_grpo", "flow_dppo"}
