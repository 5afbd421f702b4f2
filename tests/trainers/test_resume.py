"""A resumed run equals the uninterrupted one to the bit; the last complete checkpoint survives every kind of kill."""

import json
import os
import resource
import shutil
import signal

import pytest
import tiny_runs
import torch
from peft import LoraConfig
from tiny_pipelines import BUILD, quiet
from tiny_runs import (
    StopAt,
    brightness,
    checkpoints,
    config,
    in_child,
    largest_difference,
    logged,
    prompts,
    trainer,
    weights,
)
from transformers import TrainerCallback

from pisces_rl import VideoGRPOTrainer, load_pipeline
from pisces_rl.policy import default_lora_config


def state_of(made) -> dict:
    """Everything the next step depends on."""
    state = made.optimizer.state_dict()
    tensors = {f"{i}.{k}": torch.as_tensor(v) for i, entry in state["state"].items() for k, v in entry.items()}
    if made.ema is not None:
        tensors |= {f"ema.{k}": v for k, v in made.ema.average.items()}
    return tensors | {"lr": torch.tensor(made.lr_scheduler.get_last_lr(), dtype=torch.double)}


@pytest.mark.parametrize(
    "stop, settings",
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(3, {"lr_scheduler_type": "cosine"}, marks=pytest.mark.slow),  # a new epoch begins at step 3
        (4, {"lr_scheduler_type": "cosine", "ema_decay": 0.8}),
        (
            2,
            {
                "per_prompt_stat_tracking": True,
                "per_prompt_stat_tracking_min_count": 2,
                "per_prompt_stat_tracking_buffer_size": 6,
                "beta": 0.05,
            },
        ),
        (
            4,
            {
                "num_iterations": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "share_initial_noise": True,
            },
        ),
        (2, {"sde_window_size": 1, "per_device_train_batch_size": 2, "steps_per_generation": 2}),
    ],
    ids=["constant", "epoch", "ema", "statistics", "iterations", "window"],
)
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, stop, settings):
    """Shuffled data over several epochs; the checkpoint lies between two rollouts.

    test_equal_rewards.py resumes inside a rollout.
    """
    steps = stop + 2
    whole = trainer(tmp_path / "whole", max_steps=steps, **settings)
    whole.train()
    broken = trainer(tmp_path / "broken", max_steps=steps, callbacks=[StopAt(stop)], **settings)
    broken.train()
    assert broken.state.global_step == stop
    torch.manual_seed(999)  # another process has another past
    resumed = trainer(tmp_path / "broken", max_steps=steps, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == steps
    assert largest_difference(weights(whole), weights(resumed)) == 0
    assert largest_difference(state_of(whole), state_of(resumed)) == 0
    if whole.prompt_statistics is not None:
        assert whole.prompt_statistics.state_dict() == resumed.prompt_statistics.state_dict()
    for name in ("reward", "loss", "learning_rate", "epoch"):
        assert logged(whole, name) == logged(resumed, name)


@pytest.mark.slow
def test_the_order_of_the_data_is_the_uninterrupted_one(tmp_path):
    """TRL's sampler would draw epoch 0's order again after a resume in epoch 2."""

    def run(folder, callbacks, resume=False):
        seen = []

        def reward(prompts, videos, **columns):
            seen.append(prompts[0])
            return brightness(prompts, videos)

        made = trainer(folder, reward, prompts(4), max_steps=10, num_inference_steps=2, callbacks=callbacks)
        made.train(resume_from_checkpoint=resume)
        return seen

    whole = run(tmp_path / "whole", [])
    first = run(tmp_path / "broken", [StopAt(9)])
    assert first + run(tmp_path / "broken", [], resume=True) == whole
    epochs = [tuple(whole[i : i + 4]) for i in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]  # each a permutation, not the same


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    for steps in (2, 3):  # inside an epoch, and at its end
        folder = tmp_path / str(steps)
        made = trainer(folder, max_steps=steps, save_strategy="steps", save_steps=1)
        made.train()
        again = trainer(folder, max_steps=steps)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == steps
        assert largest_difference(weights(made), weights(again)) == 0


def test_a_finished_run_can_be_prolonged(tmp_path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    longer = trainer(tmp_path, max_steps=4)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    assert largest_difference(weights(longer), weights(whole)) == 0


def test_evaluation_before_training_is_not_repeated(tmp_path):
    trainer(tmp_path, callbacks=[StopAt(1)], max_steps=2, eval_dataset=prompts(2)).train()
    before = (tmp_path / "evaluations" / "step_000000.json").read_text()
    resumed = trainer(tmp_path, max_steps=2, eval_dataset=prompts(2))
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "evaluations" / "step_000000.json").read_text() == before
    assert json.loads((tmp_path / "report.json").read_text())["from_step"] == 0


def test_switching_the_average_on_starts_it_at_the_checkpoint(tmp_path):
    first = trainer(tmp_path, callbacks=[StopAt(2)], max_steps=3)
    first.train()
    resumed = trainer(tmp_path, max_steps=3, ema_decay=0.999)
    resumed.ema.on_step_end = lambda *args, **kwargs: None  # what it starts from
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(resumed.ema.average, weights(first)) == 0


def test_number_of_checkpoints(tmp_path):
    made = trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    made.train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


class NoTraining(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("training began")


def refused(folder, saved, match, **settings):
    with pytest.raises(ValueError, match=match):
        trainer(folder, callbacks=[NoTraining()], **settings).train(resume_from_checkpoint=str(saved))


def test_not_a_checkpoint(tmp_path, saved):
    for path in (tmp_path, tmp_path / "missing", saved):
        refused(tmp_path, path, "is not a checkpoint of this package .*pass an output_dir/checkpoint-N folder")
    with pytest.raises(ValueError, match="resume_from_checkpoint=True, but output_dir=.* holds no checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):  # before any model is loaded
        args = config(tmp_path, resume_from_checkpoint=str(tmp_path))
        VideoGRPOTrainer("no such model", brightness, args, prompts())


def test_other_base_weights_and_another_alpha(tmp_path, saved):
    refused(tmp_path, saved / "checkpoint-2", "was trained with other base weights", model=tiny_runs.pipeline(1))
    made = VideoGRPOTrainer(
        tiny_runs.pipeline(), brightness, config(tmp_path), prompts(), peft_config=default_lora_config(4, 64)
    )
    with pytest.raises(ValueError, match="another lora_alpha"):
        made.train(resume_from_checkpoint=str(saved / "checkpoint-2"))


def test_another_model(tmp_path, saved):
    refused(
        tmp_path,
        saved / "checkpoint-2",
        "belongs to another model: WanPipeline .*while this run trains LTXPipeline",
        model=quiet(BUILD["ltx"]()),
        height=32,
        width=32,
    )
    refused(
        tmp_path,
        saved / "checkpoint-2",
        "belongs to another model: WanPipeline from",
        model=load_pipeline("tiny-wan"),
        height=32,
        width=32,
    )


def test_another_rank_or_target(tmp_path, saved):
    refused(
        tmp_path,
        saved / "checkpoint-2",
        "does not fit transformer of this model: .*Resume with .* LoRA settings",
        rank=8,
    )
    made = VideoGRPOTrainer(
        tiny_runs.pipeline(),
        brightness,
        config(tmp_path),
        prompts(),
        callbacks=[NoTraining()],
        peft_config=LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]),
    )
    with pytest.raises(ValueError, match="does not fit transformer of this model"):
        made.train(resume_from_checkpoint=str(saved / "checkpoint-2"))


def test_another_batch(tmp_path, saved):
    """The position in the data is counted in batches: with others it would be another place."""
    for match, settings in (
        ("generation_batch_size=8, but .* was saved with 4: the position", {"per_device_train_batch_size": 8}),
        ("num_iterations=2, but .* was saved with 1", {"num_iterations": 2}),
        ("num_generations=2, but .* was saved with 4", {"num_generations": 2}),
    ):
        refused(tmp_path, saved / "checkpoint-2", match, max_steps=4, **settings)


def test_a_checkpoint_of_the_adapter_only(tmp_path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    refused(tmp_path, tmp_path / "checkpoint-1", "save_only_model=True: it has no optimizer state", max_steps=2)


def test_the_same_model_in_another_folder(tmp_path):
    """A checkpoint moves to another machine: the model's path may change."""
    for name in ("here", "there"):
        tiny_runs.pipeline().save_pretrained(tmp_path / name)
    trainer(tmp_path / "run", model=load_pipeline(str(tmp_path / "here")), callbacks=[StopAt(1)]).train()
    resumed = trainer(tmp_path / "run", model=load_pipeline(str(tmp_path / "there")), max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


# --- what may happen to a machine ------------------------------------------------------------------------------------


def run_and_be_killed(folder, file_name):
    """SIGKILL to itself while checkpoint-2 is written: after `file_name` is there, or before the rename."""
    made = trainer(folder, max_steps=3, save_strategy="steps", save_steps=1)
    replace, write_state = os.replace, made.checkpoints.write_state

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(source, target):
        if str(target).endswith("checkpoint-2"):
            kill()
        replace(source, target)

    def dying_write_state(staging, *args):
        if staging.name.endswith("checkpoint-2"):
            kill()  # adapter and optimizer are written, the rest is not
        write_state(staging, *args)

    if file_name is None:
        os.replace = dying_replace
    else:
        made.checkpoints.write_state = dying_write_state
    made.train()


@pytest.mark.parametrize(
    "file_name",
    [None, pytest.param("optimizer.safetensors", marks=pytest.mark.slow)],
    ids=["before-the-rename", "half-written"],
)
def test_kill_9_during_a_save(tmp_path, file_name):
    assert in_child(run_and_be_killed, tmp_path / "run", file_name) == -signal.SIGKILL
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    (left,) = (tmp_path / "run").glob(".incomplete-*")
    assert (left / (file_name or "policy.json")).exists()
    resumed = trainer(tmp_path / "run", max_steps=3)
    assert not list((tmp_path / "run").glob(".incomplete-*"))
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", max_steps=3)
    whole.train()
    assert largest_difference(weights(resumed), weights(whole)) == 0


def run_on_a_full_disk(folder, result):
    """Files may not grow beyond 30 kB after checkpoint-1: the system's answer to a full disk, in any writer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Full(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    made = trainer(folder, max_steps=3, save_strategy="steps", save_steps=1, callbacks=[Full()])
    try:
        made.train()
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        result.write_text(json.dumps([isinstance(error, OSError), str(error)]))
        raise


def test_full_disk(tmp_path):
    folder = tmp_path / "run"
    assert in_child(run_on_a_full_disk, folder, tmp_path / "error.json") == 1
    is_os_error, message = json.loads((tmp_path / "error.json").read_text())
    assert is_os_error, message
    for part in (
        "checkpoint-2 could not be written (rank 0: ",
        "Earlier checkpoints are intact",
        "checkpoint-1",
        "free some disk space",
    ):
        assert part in message
    assert checkpoints(folder) == ["checkpoint-1"] and not list(folder.glob(".incomplete-*"))
    resumed = trainer(folder, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def save_on_a_full_disk(folder, result):
    made = trainer(folder, max_steps=1, alive=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        made.save_model()
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        result.write_text(json.dumps([isinstance(error, OSError), str(error)]))
        raise


def test_a_full_disk_does_not_take_the_adapter_that_was_there(tmp_path):
    folder = tmp_path / "run"
    trainer(folder).save_model()
    adapter = folder / "pytorch_lora_weights.safetensors"
    before = adapter.read_bytes()
    assert in_child(save_on_a_full_disk, folder, tmp_path / "error.json") == 1
    is_os_error, message = json.loads((tmp_path / "error.json").read_text())
    assert is_os_error and "the adapter could not be written" in message
    assert adapter.read_bytes() == before and not list(folder.glob(".incomplete-*"))


def run_and_be_interrupted(folder, output):
    """Ctrl-C in the middle of the third step."""

    def reward(prompts, videos, trainer_state, **columns):
        if trainer_state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(prompts, videos)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    made = trainer(folder, reward, max_steps=4, save_strategy="steps", save_steps=1)
    with open(output, "w") as sink:
        made.console.file = sink
        made.train()


def test_ctrl_c_then_resume(tmp_path):
    folder = tmp_path / "run"
    assert in_child(run_and_be_interrupted, folder, tmp_path / "output.txt") not in (0, -signal.SIGKILL)
    text = (tmp_path / "output.txt").read_text().replace("\n", "")
    assert "Interrupted at step 2" in text and "resume_from_checkpoint=" in text and "checkpoint-2" in text
    resumed = trainer(folder, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    assert largest_difference(weights(resumed), weights(whole)) == 0


def test_saving_over_an_existing_checkpoint(tmp_path):
    """A second run in the same folder replaces what it writes again."""
    for seed in (1, 2):
        made = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, seed=seed)
        made.train()
    resumed = trainer(tmp_path, max_steps=1)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert largest_difference(weights(made), weights(resumed)) == 0
    shutil.rmtree(tmp_path / "checkpoint-1")
