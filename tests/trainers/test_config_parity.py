"""Settings and metrics that mean the same as in TRL's GRPO have its names and defaults."""

import inspect
import re
import typing
from dataclasses import MISSING, fields

import pytest
import tiny_runs
import torch
import trl

from pisces_rl import VideoGRPOConfig

# Fields whose default or type differs on purpose: our default, and the reason.
DIFFERENT = {
    "learning_rate": 1e-4,  # an adapter, not a language model
    "epsilon": 1e-3,  # per-step Gaussian log-ratios are small next to a token's
    "logging_steps": 1,  # a step takes minutes
    "report_to": "tensorboard",  # it shows videos
    "eval_on_start": True,  # the report compares with the evaluation before training
    "logging_nan_inf_filter": False,  # it would wait for the device, and hide a NaN loss
    "num_generations": 8,  # never None
    "shuffle_dataset": True,  # never None
}
# Fields of GRPOConfig that VideoGRPOConfig must offer. Not loss_type: all videos have the same number of steps.
EXPECTED = {
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "beta",
    "epsilon",
    "epsilon_high",
    "scale_rewards",
    "reward_weights",
    "multi_objective_aggregation",
    "log_completions",
    "shuffle_dataset",
    "remove_unused_columns",
    "learning_rate",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
}
TRL_METRICS = {  # key of ours: how TRL's GRPOTrainer writes it
    "reward": '"reward"',
    "reward_std": '"reward_std"',
    "rewards/brightness/mean": 'f"rewards/{reward_func_name}/mean"',
    "rewards/brightness/std": 'f"rewards/{reward_func_name}/std"',
    "frac_reward_zero_std": '"frac_reward_zero_std"',
    "kl": '"kl"',
    "clip_ratio/low_mean": '"clip_ratio/low_mean"',
    "clip_ratio/high_mean": '"clip_ratio/high_mean"',
    "clip_ratio/region_mean": '"clip_ratio/region_mean"',
    "step_time": '"step_time"',
}
METRICS = {*TRL_METRICS, "loss", "grad_norm", "learning_rate", "replay/max_log_prob_error"}


def default(field):
    return field.default if field.default is not MISSING else field.default_factory()


def test_shared_fields_have_the_same_default_and_type():
    own, theirs = ({f.name: f for f in fields(c)} for c in (VideoGRPOConfig, trl.GRPOConfig))
    types, their_types = (typing.get_type_hints(c) for c in (VideoGRPOConfig, trl.GRPOConfig))
    shared = own.keys() & theirs.keys()
    assert shared >= EXPECTED and len(shared) > 100  # transformers' arguments are among them
    changed = {n for n in shared if default(own[n]) != default(theirs[n]) or types[n] != their_types[n]}
    assert changed == DIFFERENT.keys()
    assert {name: default(own[name]) for name in DIFFERENT} == DIFFERENT


def test_every_field_has_help_and_the_docstring_names_the_differences():
    for f in fields(VideoGRPOConfig):
        assert f.metadata.get("help"), f.name
    doc = re.sub(r"\s+", " ", VideoGRPOConfig.__doc__)
    for name in DIFFERENT.keys() - {"num_generations", "shuffle_dataset"}:
        assert f"`{name}" in doc, name


def test_metrics_have_the_names_of_trl(tmp_path):
    made = tiny_runs.trainer(tmp_path, beta=0.1, max_steps=1)
    made.train()
    row = made.state.log_history[0]
    assert not METRICS - row.keys()
    source = inspect.getsource(trl.GRPOTrainer)
    assert [name for name, written in TRL_METRICS.items() if written not in source] == []
    assert [key for key in row if key.startswith("grad_norm/step_")] == ["grad_norm/step_0", "grad_norm/step_1"]


def test_scale_rewards_takes_booleans_as_trl_does(tmp_path):
    assert tiny_runs.config(tmp_path, scale_rewards=True).scale_rewards == "group"
    assert tiny_runs.config(tmp_path, scale_rewards=False).scale_rewards == "none"


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_rate_out_of_range_is_named_before_a_model_loads(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be a finite number of at least 0"):
        VideoGRPOConfig(str(tmp_path), **{name: value})


def test_batches_as_in_trl(tmp_path):
    config = tiny_runs.config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (config.generation_batch_size, config.steps_per_generation) == (8, 4)
    config = tiny_runs.config(tmp_path, per_device_train_batch_size=2, generation_batch_size=12)
    assert (config.generation_batch_size, config.steps_per_generation) == (12, 6)


@pytest.mark.parametrize(
    "cuda, supported, settings, bf16",
    [
        (True, True, {}, True),
        (True, False, {}, False),
        (False, True, {}, False),
        (True, True, {"bf16": False}, False),
        (False, False, {"bf16": True}, True),
    ],
)
def test_bf16_is_on_by_default_only_if_cuda_supports_it(tmp_path, monkeypatch, cuda, supported, settings, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: supported)
    assert VideoGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings).bf16 is bf16
