"""Every setting of the configs either acts or is refused: strangers' recipes for other trainers name many of them."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import transformers.trainer
from trainers.tiny_runs import trainer

from pisces_rl import METHODS, RewardBackpropConfig, VideoGRPOConfig, trainers
from pisces_rl.trainers.base._trl import _BaseConfig
from pisces_rl.trainers.base.setup.inherited_settings import (
    HARMLESS,
    OPTIMIZERS_WITHOUT_STEP,
    SOME_WITHOUT_EFFECT,
    WITHOUT_EFFECT,
)

CONFIGS = (*(config for _, config in METHODS.values()), RewardBackpropConfig)

# Inherited settings that act, by what reads them. A field in none of these lists and in no table is undecided.
READ_BY = {
    "our trainers": """
        per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size bf16 fp16 seed
        gradient_checkpointing torch_compile torch_compile_backend torch_compile_mode max_grad_norm
        save_only_model eval_strategy eval_on_start load_best_model_at_end metric_for_best_model output_dir
        save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_revision hub_strategy
        resume_from_checkpoint ddp_timeout use_cpu fsdp fsdp_config deepspeed disable_tqdm report_to""",
    "the Trainer's loop": """
        num_train_epochs max_steps activation_checkpointing logging_nan_inf_filter greater_is_better
        ignore_data_skip restore_callback_states_from_checkpoint full_determinism debug skip_memory_metrics""",
    "its optimizer and schedule": """
        learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
        adam_beta1 adam_beta2 adam_epsilon""",
    "its DefaultFlowCallback": """
        logging_strategy logging_steps logging_first_step eval_steps eval_delay save_strategy save_steps""",
    "its data loader": """
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context""",
    "TrainingArguments itself": "tf32 ddp_backend log_level log_level_replica log_on_each_node save_on_each_node",
    "the callbacks of report_to": "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
}
# Settings that say nothing to a trainer, or say what is so anyway.
SAYS_NOTHING = {
    "do_train": "for a user's own script",
    "do_eval": "for a user's own script",
    "do_predict": "for a user's own script",
    "local_rank": "a launcher's; the environment says it",
    "dataloader_drop_last": "an incomplete batch is always left out",
}
# A value other than the default for each refused field; True where it is a switch that is off.
OTHER = {
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "neftune_noise_alpha": 5.0,
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all",
    "liger_kernel_config": {"rope": True},
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "data_seed": 1,
    "dataloader_in_order": False,
    "accelerator_config": {"split_batches": True},
    "eval_accumulation_steps": 4,
    "eval_do_concat_batches": False,
    "include_for_metrics": ["inputs"],
    "torch_empty_cache_steps": 10,
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "optim_target_modules": "all-linear",
    "ddp_bucket_cap_mb": 50,
    "parallelism_config": {"cp_size": 2},
}


def config(cls, folder, **settings):
    return cls(output_dir=str(folder), use_cpu=True, bf16=settings.pop("bf16", False), **settings)


def test_every_inherited_field_is_classified_once():
    """A field that a new transformers adds must take effect or be listed in the table."""
    acting = [name for names in READ_BY.values() for name in names.split()]
    decided = [*acting, *SAYS_NOTHING, *(WITHOUT_EFFECT.keys() | SOME_WITHOUT_EFFECT.keys()) - {"hub_strategy"}]
    assert len(decided) == len(set(decided))
    assert {f.name for f in fields(_BaseConfig)} == set(decided)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_of_ours_is_read(cls):
    """A setting that no code reads has no effect."""
    sources = [p.read_text() for p in Path(trainers.__file__).parent.rglob("*.py")]
    inherited = {f.name for f in fields(_BaseConfig)}
    uses = re.compile(r"(?<=args\.)\w+|(?<=self\.)\w+|(?<=\")\w+(?=\")")
    read = {name for text in sources for name in uses.findall(text)}
    assert {f.name for f in fields(cls)} - inherited - read == set()


def test_what_the_trainers_loop_reads_is_still_there():
    """transformers' own code reads the settings that are said to act through it."""
    source = Path(transformers.trainer.__file__).read_text()
    for name in READ_BY["the Trainer's loop"].split() + READ_BY["its data loader"].split():
        assert re.search(rf"args\.{name}\b", source), name


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(cls, name, tmp_path):
    """A stranger set it, and the run was the same as without."""
    name_in_message = name.replace("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    with pytest.raises(ValueError, match=f"^{name_in_message}=.* is not supported: .*[.]$"):
        config(cls, tmp_path, **{name: OTHER.get(name, True)})


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_the_hub_is_pushed_to_once(strategy, tmp_path):
    """hub_strategy='checkpoint' pushed no checkpoint; 'end' is what happens."""
    with pytest.raises(ValueError, match="hub_strategy=.*save_model pushes once"):
        config(VideoGRPOConfig, tmp_path, hub_strategy=strategy)
    assert config(VideoGRPOConfig, tmp_path, hub_strategy="end").hub_strategy == "end"


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "schedule_free_adamw", "apollo_adamw"])
def test_an_optimizer_that_needs_another_training_step_is_refused(optim, tmp_path):
    """A schedule-free optimizer never heard optimizer.train()."""
    assert optim.startswith(OPTIMIZERS_WITHOUT_STEP)
    with pytest.raises(ValueError, match=f"optim='{optim}' needs transformers' training step"):
        config(VideoGRPOConfig, tmp_path, optim=optim)


def test_a_config_accepts_the_values_of_another(tmp_path):
    """The settings of one config, taken over into another."""
    made = config(RewardBackpropConfig, tmp_path)
    own = {f.name: getattr(made, f.name) for f in fields(made) if f.init}
    RewardBackpropConfig(**own)


@pytest.mark.parametrize("name", [*HARMLESS, "data_seed"])
def test_settings_that_repeat_what_happens_anyway_are_accepted(name, tmp_path):
    """gradient_checkpointing_kwargs={"use_reentrant": False} is in nearly every recipe."""
    for value in HARMLESS.get(name, (42,)):
        config(VideoGRPOConfig, tmp_path, **{name: value})


def test_checkpointing_is_non_reentrant(tmp_path):
    trainer(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, max_steps=1
    ).train()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "each optimizer step samples 8 videos (2 x 4)"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 1},
            "each optimizer step samples 32 videos (8 x 4)",
        ),
        (
            {"num_iterations": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
            "every 1.5 optimizer steps sample 16 videos (4 x 4)",
        ),
    ],
)
def test_videos_a_step(settings, said, tmp_path):
    """A step that takes several rollouts was said to sample one."""
    made = config(VideoGRPOConfig, tmp_path, per_device_train_batch_size=8, num_generations=4, **settings)
    assert made.videos_a_step() == said
