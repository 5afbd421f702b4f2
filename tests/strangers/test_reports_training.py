"""Public reports on the training loop: stops, resumes, callbacks, settings, folders."""

import asyncio
import os
import shutil
import stat

import pytest
import torch
from datasets import Dataset
from trainers.tiny_runs import (
    StopAt,
    brightness,
    checkpoints,
    config,
    largest_difference,
    logged,
    pipeline,
    prompts,
    trainer,
    weights,
)
from transformers import EarlyStoppingCallback, TrainerCallback

EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def test_a_run_whose_folder_was_moved_keeps_its_best_model(tmp_path):
    """transformers #10412, best_model_checkpoint is an absolute path: no best model was loaded, without a word."""
    settings = EVALUATED | {"eval_dataset": prompts(1), "max_steps": 3, "save_total_limit": 1, "num_sample_videos": 0}
    trainer(tmp_path / "a", callbacks=[StopAt(2)], learning_rate=0.0, **settings).train()
    shutil.move(tmp_path / "a", tmp_path / "b")
    resumed = trainer(tmp_path / "b", learning_rate=0.0, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-1")
    assert "checkpoint-1" in checkpoints(tmp_path / "b")


def test_a_misspelt_best_metric_is_said_at_the_first_evaluation(tmp_path):
    """trl #3384, GRPO cannot use rewards as best metric: a KeyError after the first interval of training."""
    made = trainer(tmp_path, eval_dataset=prompts(2), metric_for_best_model="rewrd", **EVALUATED)
    with pytest.raises(ValueError, match=r"metric_for_best_model='rewrd' is not a metric .*one of \['eval_reward', "):
        made.train()
    assert made.state.global_step == 0


def test_early_stopping_keeps_its_count_after_a_resume(tmp_path):
    """transformers #28544, early stopping patience does not work when resuming from checkpoint."""
    settings = EVALUATED | {
        "eval_dataset": prompts(1),
        "max_steps": 6,
        "learning_rate": 0.0,
        "num_sample_videos": 0,
        "restore_callback_states_from_checkpoint": True,
    }
    trainer(tmp_path, callbacks=[EarlyStoppingCallback(2), StopAt(2)], **settings).train()
    resumed = trainer(tmp_path, callbacks=[EarlyStoppingCallback(2)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_an_interrupted_trainer_trains_again(tmp_path):
    """transformers #35033, training and KeyboardInterrupt: a notebook's pipeline and trainer are as they were."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    made, callback = trainer(tmp_path), Interrupt()
    made.add_callback(callback)
    encode, scheduler = made.pipeline.encode_prompt, made.pipeline.scheduler
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.pipeline.encode_prompt == encode and made.pipeline.scheduler is scheduler
    made.remove_callback(callback)
    made.train()
    assert made.state.global_step == 2


def test_a_second_train_starts_a_new_schedule(tmp_path):
    """icevision #34, Trainer.fit more than once: the second must not begin where the schedule ended, at 0."""
    made = trainer(tmp_path, lr_scheduler_type="linear")
    made.train()
    before, rates = weights(made), logged(made, "learning_rate")
    made.train()
    assert logged(made, "learning_rate") == rates and largest_difference(weights(made), before) > 0


def test_a_run_without_any_reward_says_so(tmp_path):
    """trl #6426, every reward function returns None: no advantage, and a warning in place of a loss of 0."""
    made = trainer(tmp_path, lambda prompts, videos, **columns: [None] * len(prompts), max_steps=1)
    before = weights(made)
    with pytest.warns(UserWarning, match="no reward applies to 4 of a rollout's 4 videos"):
        made.train()
    assert largest_difference(weights(made), before) == 0


def test_a_video_without_a_reward_does_not_count_as_zero(tmp_path):
    """trl #5773, NaN-poisoned group mean: among rewards below 0 a missing one must not look like the best."""
    made = trainer(tmp_path, lambda prompts, videos, **columns: [None, -1.0, -2.0, -3.0], max_steps=1)
    made.train()
    assert made.scored.advantages.isfinite().all() and made.scored.advantages[0] == 0
    assert made.scored.advantages[1] == pytest.approx(1, abs=1e-3) and logged(made, "reward") == [-2.0]


def test_one_scored_video_of_a_group_teaches_nothing(tmp_path):
    """trl #5773, review: one value has no deviation, and must not divide by NaN."""
    made = trainer(tmp_path, lambda prompts, videos, **columns: [1.0, None, None, None], max_steps=1)
    before = weights(made)
    made.train()
    assert largest_difference(weights(made), before) == 0


def test_rewards_in_half_precision(tmp_path):
    """OpenRLHF #1334, bf16 rewards lose the group's baseline; trl #1391, they could not be logged."""

    def reward(prompts, videos, **columns):
        return torch.tensor([1.0, 1.0, 1.0, 1.0078125], dtype=torch.bfloat16)

    made = trainer(tmp_path, reward, max_steps=1)
    made.train()
    assert made.scored.advantages.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=5e-2)


def test_an_async_reward_where_a_loop_runs(tmp_path):
    """open-r1 #495, async rewards and asyncio.run: a notebook's event loop runs already."""

    async def reward(prompts, videos, **columns):
        await asyncio.sleep(0)
        return brightness(prompts, videos)

    async def cell():
        made = trainer(tmp_path, reward, max_steps=1)
        made.train()
        return made.state.global_step

    assert asyncio.run(cell()) == 1


def test_counting_input_tokens(tmp_path):
    """trl #3081, include_tokens_per_second crashes GRPO: a setting of language models is refused by name."""
    with pytest.raises(ValueError, match="include_num_input_tokens_seen=.*there are no tokens to count"):
        config(tmp_path, include_num_input_tokens_seen=True)


def test_report_to_none(tmp_path):
    """trl #4249, why 'none' instead of None: both are nothing."""
    assert config(tmp_path, report_to=None).report_to == []


def test_a_reward_that_changes_the_working_directory(tmp_path, monkeypatch):
    """transformers #10412, its kind: a run was split over two folders, one a working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    def reward(prompts, videos, **columns):
        os.chdir(tmp_path / "other")
        return brightness(prompts, videos)

    made = trainer("run", reward, save_strategy="steps", save_steps=1, max_steps=1)
    made.train()
    made.save_model()
    assert not any((tmp_path / "other").iterdir())
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_a_home_folder(tmp_path, monkeypatch):
    """transformers #10628, expanduser path in Trainer: '~/run' does not mean a folder named '~'."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trainer("~/run").args.output_dir == str(tmp_path / "run")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_output_dir_that_is_no_folder(tmp_path, kind):
    """biome-text #580, train() and folders: a clear word, before a model is loaded."""
    path = tmp_path / "run"
    path.write_text("notes") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="output_dir='.*run' cannot be created .*choose a writable folder"):
        trainer(path, model="no such model")


def test_files_are_as_readable_as_their_folder(tmp_path):
    """sentence-transformers #4010, model.safetensors is missing read permissions after saving."""
    (tmp_path / "run").mkdir(mode=0o755)
    made = trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model()
    files = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*.safetensors")
    }
    folders = {stat.S_IMODE(path.stat().st_mode) & 0o666 for path in tmp_path.rglob("checkpoint-*")}
    assert len(files) == 6 and set(files.values()) == folders | {0o644}, files


def test_a_transform_that_draws(tmp_path):
    """trl #6039, with_transform is applied at every reading: a group's videos would have several prompts."""
    count = iter(range(1000))
    data = prompts().with_transform(lambda rows: {"prompt": [f"{text} {next(count)}" for text in rows["prompt"]]})
    made = trainer(tmp_path, data=data)
    with pytest.raises(RuntimeError, match="group 0 mixes prompts .*dataset.map"):
        made.train()


def test_the_remainder_of_an_epoch(tmp_path):
    """trl #3477, why are some batches of prompts not involved in training: whole rollouts of whole groups only."""
    seen = []

    def reward(prompts, videos, **columns):
        seen.extend(prompts)
        return brightness(prompts, videos)

    data = Dataset.from_dict({"prompt": list("abcde")})
    made = trainer(tmp_path, reward, data, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8)
    made.train()
    assert made.state.global_step == 2 and len(seen) == 16 and len(set(seen)) == 4
    assert all(len(set(seen[i : i + 4])) == 1 for i in range(0, 16, 4))


def test_two_trainers_in_one_process_do_not_interfere(tmp_path):
    """transformers #40376, TrainingArguments reset AcceleratorState: the second run equals the first, of one seed."""
    first, second = trainer(tmp_path / "a", max_steps=1), trainer(tmp_path / "b", max_steps=1, model=pipeline())
    first.train()
    second.train()
    assert largest_difference(weights(first), weights(second)) == 0
