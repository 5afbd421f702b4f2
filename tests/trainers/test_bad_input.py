"""A user's mistake is a clear error before any training: the argument, the value, and the fix."""

import math
import warnings

import pytest
import tiny_runs
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import config, largest_difference, pipeline, prompts, trainer, weights

from pisces_rl import RewardError, VideoGRPOConfig, VideoGRPOTrainer


@pytest.fixture(scope="module")
def shared():
    """One pipeline for trainers that fail before they touch it."""
    return pipeline()


# --- data ---


@pytest.mark.parametrize(
    "data, message",
    [
        (Dataset.from_dict({"prompt": []}), "train_dataset is empty; it needs at least one prompt"),
        (Dataset.from_dict({"text": ["a"] * 3}), r"train_dataset has columns \['text'\] but none named `prompt`"),
        (Dataset.from_dict({"prompt": [1, 2, 3]}), "train_dataset row 0: prompt is 1; every prompt must be a string"),
        (Dataset.from_dict({"prompt": ["a", None, "b"]}), "train_dataset row 1: prompt is None"),
        (["a", "b", "c"], "train_dataset is a list; pass a datasets.Dataset with a `prompt` column"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), "train_dataset is a IterableDataset; pass"),
        ({"train": prompts(3)}, "train_dataset is a dict"),
    ],
    ids=["empty", "column", "number", "none", "list", "iterable", "dict"],
)
def test_train_dataset(tmp_path, shared, data, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, data=data, model=shared)


def test_no_train_dataset(tmp_path, shared):
    with pytest.raises(ValueError, match="train_dataset is a NoneType; pass a datasets.Dataset"):
        VideoGRPOTrainer(shared, tiny_runs.brightness, config(tmp_path))


def test_fewer_prompts_than_a_rollout_needs(tmp_path, shared):
    with pytest.raises(ValueError, match="a rollout needs 4 different prompts .*but train_dataset has only 3; add"):
        trainer(tmp_path, model=shared, per_device_train_batch_size=16)


@pytest.mark.parametrize(
    "data, message",
    [
        (Dataset.from_dict({"prompt": []}), "eval_dataset is empty"),
        ({"easy": prompts(2), "hard": Dataset.from_dict({"text": ["a"]})}, r"eval_dataset\['hard'\] has columns"),
    ],
)
def test_eval_dataset(tmp_path, shared, data, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=shared, eval_dataset=data)


def test_evaluation_without_a_data_set(tmp_path, shared):
    with pytest.raises(ValueError, match="eval_strategy='steps' needs an eval_dataset"):
        trainer(tmp_path, model=shared, eval_strategy="steps", eval_steps=1)


def test_an_empty_prompt_is_a_prompt(tmp_path):
    made = trainer(tmp_path, data=Dataset.from_dict({"prompt": ["", "a"]}), max_steps=2)
    made.train()
    assert made.state.global_step == 2


# --- batches and settings ---


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"per_device_train_batch_size": 6},
            r"rollout of 6 videos .*num_generations=4; choose num_generations among "
            r"\[2, 3, 6\]",
        ),
        ({"num_generations": 1}, "num_generations=1: advantages need at least 2"),
        ({"generation_batch_size": 6}, "generation_batch_size=6 must be a multiple of .*= 4"),
        ({"generation_batch_size": 8, "steps_per_generation": 2}, "set the same thing; set only one"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "steps_per_generation=3 and gradient_accumulation_steps=2: one must divide the other",
        ),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0 must be at least 1, or unset"),
        ({"rollout_batch_size": -1}, "rollout_batch_size=-1 must be at least 1"),
        ({"fp16": True}, "fp16=True is not supported"),
        ({"scale_rewards": "std"}, "scale_rewards='std' must be one of"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum' must be one of"),
        ({"kl_space": "y"}, "kl_space='y' must be one of"),
        ({"step_weighting": "dt"}, "step_weighting='dt' must be one of"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie between 0 and 1"),
        ({"vae_cudnn_benchmark": True, "full_determinism": True}, "which full_determinism excludes"),
        ({"offload": "vae"}, "offload='vae' must be a list with any of"),
        ({"offload": ["vae", "optimizer"]}, r"offload=\['vae', 'optimizer'\] must be a list with any of \['text_enc"),
        ({"epsilon": 0.0}, "epsilon=0.0 .*must be positive"),
        ({"beta": -0.1}, "beta=-0.1 must not be negative"),
        ({"num_iterations": 0}, "num_iterations=0 must be at least 1"),
        ({"sde_window_range": [1]}, r"sde_window_range=\[1\] must be two integers"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported: it would change the batch"),
        ({"pipeline_kwargs": "max_sequence_length=24"}, "pipeline_kwargs='max_sequence_length=24' is not JSON"),
        ({"pipeline_kwargs": "[1]"}, r"pipeline_kwargs=\[1\] must be a dict"),
    ],
)
def test_config(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_group_of_four_only_warns(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8}
    with pytest.warns(UserWarning, match="num_generations=4: on video, groups below 8"):
        VideoGRPOConfig(**settings, num_generations=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="num_generations")
        VideoGRPOConfig(**settings, num_generations=8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"transition": "flow"}, r"transition='flow' does not fit .*use one of \['flow_sde', "),
        (
            {"transition": "ddim"},
            "transition='ddim' does not fit a pipeline with FlowMatchEulerDiscreteScheduler; use",
        ),
        ({"sde_window_range": [0, 3]}, r"sde_window_range=\[0, 3\] must satisfy 0 <= low < high <= 2"),
        ({"sde_window_range": [1, 1]}, r"sde_window_range=\[1, 1\] must satisfy"),
        ({"sde_window_size": 3}, "sde_window_size=3 must be between 1 and 2"),
        ({"num_inference_steps": 1}, "num_inference_steps=1: GRPO needs at least 2 steps"),
        ({"pipeline_kwargs": {"max_length": 3}}, "WanPipeline takes no argument 'max_length'; it takes"),
        ({"pipeline_kwargs": {"num_videos_per_prompt": 2}}, "num_videos_per_prompt=2: repeat the prompt instead"),
        ({"pipeline_kwargs": {"latents": 1}}, "'latents' would change the policy's latents"),
    ],
)
def test_policy_settings(tmp_path, shared, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=shared, **settings)


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"target_modules": ["to_qq"]}, r"LoRA target \['to_qq'\] matches no module of transformer .*choose target"),
        ({"target_modules": ["to_q", "nothing"]}, r"LoRA target \['nothing'\] matches no module"),
        ({"target_modules": ["to_q"], "lora_dropout": 0.1}, "lora_dropout=0.1: .*set it to 0"),
        ({"target_modules": ["to_q"], "task_type": "CAUSAL_LM"}, "task_type=.* is for language models"),
    ],
)
def test_lora(tmp_path, lora, message):
    with pytest.raises(ValueError, match=message):
        VideoGRPOTrainer(pipeline(), tiny_runs.brightness, config(tmp_path), prompts(), peft_config=LoraConfig(**lora))


@pytest.mark.parametrize(
    "model, message",
    [
        ("tiny-wam", r"model='tiny-wam' is not a folder .*embedded models \['tiny-"),
        ("not a name!!", "model='not a name!!' is not a folder"),
        (3, "model=3 must be a diffusers pipeline"),
        (None, "model=None must be a diffusers pipeline"),
    ],
)
def test_model(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        VideoGRPOTrainer(model, tiny_runs.brightness, config(tmp_path), prompts())


# --- rewards ---


@pytest.mark.parametrize(
    "rewards, settings, message",
    [
        (None, {}, "reward_funcs is empty; pass at least one callable"),
        ([], {}, "reward_funcs is empty"),
        (["brightness"], {}, "reward 'brightness' is unknown"),
        (
            tiny_runs.brightness,
            {"reward_weights": [1.0, 2.0]},
            "reward_weights has 2 values for 1 rewards; set one per reward",
        ),
    ],
)
def test_reward_funcs(tmp_path, shared, rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rewards, model=shared, **settings)


def test_judges_are_checked_too(tmp_path, shared):
    with pytest.raises(ValueError, match="'judge' is unknown"):
        trainer(tmp_path, model=shared, judges=["judge"])


@pytest.fixture(scope="module")
def after_one_step(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("one"), max_steps=1)
    made.train()
    return weights(made)


class FailsLater:
    """Good for one rollout, then returns (or raises) `bad`."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def __call__(self, prompts, videos, **columns):
        self.calls += 1
        if self.calls == 1:
            return tiny_runs.brightness(prompts, videos)
        if isinstance(self.bad, Exception):
            raise self.bad
        return self.bad


@pytest.mark.parametrize(
    "bad, message",
    [
        (RuntimeError("no server"), "reward 'FailsLater' raised RuntimeError: no server"),
        ([1.0, math.nan, 0.0, 0.0], "reward 'FailsLater' returned nan for sample 1, prompt 'clip [012]'"),
        ([0.0, 0.0, 0.0, math.inf], "reward 'FailsLater' returned inf for sample 3, prompt 'clip [012]'"),
        ([1.0, 2.0, 3.0], "reward 'FailsLater' returned 3 values for 4 videos"),
        (["a"] * 4, "reward 'FailsLater' returned list, which is not a list of numbers"),
    ],
    ids=["raises", "nan", "inf", "count", "text"],
)
def test_a_failing_reward_stops_before_it_is_learned_from(tmp_path, after_one_step, bad, message):
    made = trainer(tmp_path, FailsLater(bad), max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(RewardError, match=message):
        made.train()
    assert made.state.global_step == 1 and tiny_runs.checkpoints(tmp_path) == ["checkpoint-1"]
    assert largest_difference(weights(made), after_one_step) == 0  # the bad rollout changed nothing
    assert all(p.isfinite().all() for p in made.adapter.values())


def test_a_failed_run_resumes_from_its_last_checkpoint(tmp_path):
    made = trainer(tmp_path, FailsLater(RuntimeError("no server")), max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(RewardError):
        made.train()
    fixed = trainer(tmp_path, max_steps=3)
    fixed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", max_steps=3)
    whole.train()
    assert largest_difference(weights(fixed), weights(whole)) == 0


def test_a_replay_that_differs_stops(tmp_path):
    """Rollout and update must be the same computation: here the weights move in between."""
    made = trainer(tmp_path, alive=True, replay_tolerance=1e-6)
    score = made.rewards.funcs[0]

    def moves(prompts, videos, **columns):
        with torch.no_grad():
            next(iter(made.adapter.values())).add_(0.5)
        return score(prompts, videos)

    made.rewards.funcs[0] = moves
    with pytest.raises(RuntimeError, match="denoising step 0: log p differs by .* between sampling and update"):
        made.train()
    assert made.state.global_step == 0
