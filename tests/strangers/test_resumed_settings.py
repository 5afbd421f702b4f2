"""A run resumed with other settings: a change takes effect and is reported, or is refused with both values."""

import pytest
from trainers.tiny_runs import StopAt, largest_difference, logged, prompts, trainer, weights

LINEAR = {"lr_scheduler_type": "linear", "max_steps": 4}


def stopped(folder, step=2, **settings):
    made = trainer(folder, callbacks=[StopAt(step)], **LINEAR | settings)
    made.train()
    return made


def loaded(folder, **settings):
    """A resumed run just before its first step."""
    made = trainer(folder, **LINEAR | settings)
    made._load_from_checkpoint(str(folder / "checkpoint-2"))
    return made


def test_the_average_switched_off_leaves_the_live_weights(tmp_path):
    """Resumed without ema_decay, a run went on from the average that its checkpoint's adapter file holds."""
    made = stopped(tmp_path, ema_decay=0.8)
    assert largest_difference(made.ema.average, weights(made)) > 0
    for settings in ({}, {"ema_decay": 0.5}):
        assert largest_difference(weights(loaded(tmp_path, **settings)), weights(made)) == 0


def test_a_changed_learning_rate_takes_effect_and_is_reported(tmp_path):
    """The optimizer went on with the old one, while the card printed the new one."""
    stopped(tmp_path)
    resumed = trainer(tmp_path, **LINEAR, **{"learning_rate": 4e-3, "weight_decay": 0.1, "adam_beta2": 0.9})
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "learning_rate")[2:] == pytest.approx([4e-3 / 2, 4e-3 / 4])
    group = resumed.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.9))
    changes = resumed._card_settings()["changed on resume"]
    for part in ("learning_rate 0.01 until step 2, then 0.004", "weight_decay 0.0 until", "adam_beta2 0.999 until"):
        assert part in changes


def test_changed_settings_are_reported_by_value(tmp_path):
    """The card said "SchedulerType.COSINE"."""
    trainer(tmp_path, callbacks=[StopAt(2)], **LINEAR).train()
    made = trainer(tmp_path, **LINEAR | {"lr_scheduler_type": "cosine"})
    made.train(resume_from_checkpoint=True)
    assert made._card_settings()["changed on resume"] == "lr_scheduler_type linear until step 2, then cosine"


def test_a_longer_run_follows_its_own_schedule_at_once(tmp_path):
    """After max_steps the old schedule had reached 0, with which the first step of the longer run was made."""
    trainer(tmp_path, **LINEAR | {"max_steps": 2}, save_strategy="steps", save_steps=2).train()
    longer = trainer(tmp_path, **LINEAR)
    longer.train(resume_from_checkpoint=True)
    assert logged(longer, "learning_rate")[2:] == pytest.approx([1e-2 / 2, 1e-2 / 4])
    assert "max_steps 2 until step 2, then 4" in longer._card_settings()["changed on resume"]


def test_saving_and_logging_follow_the_new_settings(tmp_path):
    """A resumed run saved and logged as often as the one before it."""
    stopped(tmp_path, save_strategy="steps", save_steps=10)
    resumed = trainer(tmp_path, **LINEAR, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_changes_of_an_earlier_resume_stay_in_the_card(tmp_path):
    """A run that was resumed twice reports both changes."""
    stopped(tmp_path)
    trainer(tmp_path, **LINEAR, learning_rate=4e-3, callbacks=[StopAt(3)]).train(resume_from_checkpoint=True)
    last = trainer(tmp_path, **LINEAR, learning_rate=2e-3)
    last.train(resume_from_checkpoint=True)
    changes = last._card_settings()["changed on resume"]
    assert changes == "learning_rate 0.01 until step 2, then 0.004; learning_rate 0.004 until step 3, then 0.002"


def test_another_optimizer_is_refused(tmp_path):
    """SGD took Adam's state, and the run was Adam's."""
    stopped(tmp_path)
    with pytest.raises(ValueError, match="optim=.*sgd.*was saved with 'adamw_torch_fused': the saved optimizer state"):
        trainer(tmp_path, **LINEAR, optim="sgd").train(resume_from_checkpoint=True)


def test_a_schedule_that_follows_scores_is_not_replaced(tmp_path):
    """reduce_lr_on_plateau keeps its rate in a separate state."""
    stopped(tmp_path)
    with pytest.raises(ValueError, match="lr_scheduler_type=.*reduce_lr_on_plateau.*was saved with 'linear'"):
        trainer(
            tmp_path,
            **LINEAR | {"lr_scheduler_type": "reduce_lr_on_plateau"},
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="reward",
            eval_dataset=prompts(2),
        ).train(resume_from_checkpoint=True)


def test_unchanged_settings_report_nothing(tmp_path):
    """The ordinary resume."""
    stopped(tmp_path)
    resumed = trainer(tmp_path, **LINEAR)
    resumed.train(resume_from_checkpoint=True)
    assert "changed on resume" not in resumed._card_settings()


def test_the_best_model_restarts_every_average(tmp_path):
    """A second train() starts its average from what load_best_model_at_end loaded."""
    made = trainer(
        tmp_path,
        max_steps=2,
        ema_decay=0.8,
        eval_dataset=prompts(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    made.train()
    assert largest_difference(made.ema.average, weights(made)) == 0
