"""Names and defaults of TRL's GRPOConfig, where they mean the same."""

import re
import typing
from dataclasses import MISSING, fields

import tiny_runs
import trl

from pisces_rl import VideoGRPOConfig

# Deliberate differences of default or type, and why.
DIFFERENT = {
    "learning_rate": "an adapter, not a language model",
    "epsilon": "per-step Gaussian log-ratios are small next to a token's",
    "logging_steps": "a step takes minutes",
    "report_to": "videos go to TensorBoard",
    "eval_on_start": "the evaluation before training is the 'before' of the report",
    "logging_nan_inf_filter": "it would wait for the device, and hide a loss that is no number",
    "num_generations": "never None",
    "shuffle_dataset": "never None",
}
# Fields of GRPOConfig that VideoGRPOConfig must offer, as rl.md lists them (loss_type: all videos have as many steps).
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
METRICS = [
    "reward",
    "reward_std",
    "rewards/brightness/mean",
    "rewards/brightness/std",
    "frac_reward_zero_std",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "step_time",
    "loss",
    "grad_norm",
    "learning_rate",
    "replay/max_log_prob_error",
]


def default(field):
    return field.default if field.default is not MISSING else field.default_factory()


def test_shared_fields_have_the_same_default_and_type():
    own, theirs = ({f.name: f for f in fields(c)} for c in (VideoGRPOConfig, trl.GRPOConfig))
    types, their_types = (typing.get_type_hints(c) for c in (VideoGRPOConfig, trl.GRPOConfig))
    shared = own.keys() & theirs.keys()
    assert shared >= EXPECTED and len(shared) > 100  # transformers' arguments are among them
    changed = {n for n in shared if default(own[n]) != default(theirs[n]) or types[n] != their_types[n]}
    assert changed == DIFFERENT.keys()


def test_every_field_has_help_and_the_docstring_tells_the_differences():
    for f in fields(VideoGRPOConfig):
        assert f.metadata.get("help"), f.name
    doc = re.sub(r"\s+", " ", VideoGRPOConfig.__doc__)
    for name in DIFFERENT.keys() - {"num_generations", "shuffle_dataset"}:
        assert f"`{name}" in doc, name


def test_metrics_have_trls_names(tmp_path):
    made = tiny_runs.trainer(tmp_path, beta=0.1, max_steps=1)
    made.train()
    row = made.state.log_history[0]
    assert not set(METRICS) - row.keys()
    assert [key for key in row if key.startswith("grad_norm/step_")] == ["grad_norm/step_0", "grad_norm/step_1"]


def test_scale_rewards_takes_booleans_as_trl_does(tmp_path):
    assert tiny_runs.config(tmp_path, scale_rewards=True).scale_rewards == "group"
    assert tiny_runs.config(tmp_path, scale_rewards=False).scale_rewards == "none"


def test_batches_as_in_trl(tmp_path):
    config = tiny_runs.config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (config.generation_batch_size, config.steps_per_generation) == (8, 4)
    config = tiny_runs.config(tmp_path, per_device_train_batch_size=2, generation_batch_size=12)
    assert (config.generation_batch_size, config.steps_per_generation) == (12, 6)


def test_bf16_only_where_cuda_has_it(tmp_path):
    import torch

    config = VideoGRPOConfig(output_dir=str(tmp_path))
    assert config.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
