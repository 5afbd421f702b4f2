"""Settings of transformers and TRL that nothing here would read, and of a config's base that its method would not:
what to use in place of each.

They belong to training steps, evaluations, samplers and wrappers that these trainers replace.
`tests/strangers/test_settings.py` decides about every field of the configs, so that a new transformers is noticed.
"""

from dataclasses import MISSING, fields

from transformers.trainer_pt_utils import AcceleratorConfig

#: {field: what to do instead}. Every value but the default is refused.
WITHOUT_EFFECT = {
    # language models
    "label_smoothing_factor": "there are no labels to smooth; leave it 0.",
    "label_names": "there are no labels; every column of the data set reaches the rewards.",
    "neftune_noise_alpha": "there is no embedding layer to disturb; noise_level is the exploration noise of GRPO.",
    "average_tokens_across_devices": "there are no tokens to count: every video has the same weight in the loss.",
    "include_num_input_tokens_seen": "there are no tokens to count; the log says the epoch and the step.",
    "use_cache": "a denoiser has no key-value cache; prompts are encoded once without asking.",
    "use_liger_kernel": "Liger's kernels are for language models; set torch_compile=True or attention_kernel.",
    "liger_kernel_config": "Liger's kernels are for language models; set torch_compile=True or attention_kernel.",
    # data
    "remove_unused_columns": "it would take the columns from the rewards; remove them from the data set instead.",
    "train_sampling_strategy": "prompts are shuffled, or with shuffle_dataset=False taken in the data set's order.",
    "length_column_name": "videos of a batch have one length: num_frames.",
    "data_seed": "seed orders the data, too; set seed, or shuffle the data set with a seed of your own.",
    "dataloader_in_order": "batches out of order would tear the groups of a prompt apart.",
    "accelerator_config": "the trainer divides the batches among processes itself; leave it unset.",
    # evaluation
    "prediction_loss_only": "an evaluation samples videos and scores them; it has no loss.",
    "eval_accumulation_steps": "scores are gathered once for each data set; lower per_device_eval_batch_size.",
    "eval_do_concat_batches": "there are no predictions to join: evaluations/ holds a score for each prompt.",
    "eval_use_gather_object": "scores are always gathered as objects.",
    "include_for_metrics": "metrics come from rewards and judges; these get the prompts, the videos and all columns.",
    "batch_eval_metrics": "metrics come from rewards and judges; give another one as a judge_func.",
    "bf16_full_eval": "an evaluation computes in what training computes in: set bf16=True.",
    "fp16_full_eval": "an evaluation computes in what training computes in: set bf16=True.",
    # memory and speed
    "auto_find_batch_size": "it would change the batch under way; lower per_device_train_batch_size.",
    "torch_empty_cache_steps": "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, or offload.",
    "activation_checkpointing_kwargs": "denoisers checkpoint their own blocks, without options; leave it unset.",
    "gradient_checkpointing_kwargs": "denoisers checkpoint their own blocks, without options; leave it unset.",
    "optim_target_modules": "GaLore and APOLLO are for full matrices, an adapter is small; use adamw_torch.",
    # many processes
    "ddp_find_unused_parameters": "no DDP wrapper is used: the adapter's gradients are averaged once a step.",
    "ddp_bucket_cap_mb": "no DDP wrapper is used: the adapter's gradients are averaged once a step.",
    "ddp_broadcast_buffers": "no DDP wrapper is used: the adapter's gradients are averaged once a step.",
    "ddp_static_graph": "no DDP wrapper is used: the adapter's gradients are averaged once a step.",
    "parallelism_config": "set context_parallel, or start with FSDP2 or DeepSpeed (docs/processes.md).",
    # checkpoints and the Hub
    "enable_jit_checkpoint": "a kill could leave half a checkpoint; set save_steps, and resume from the last one.",
    "hub_always_push": "save_model pushes once, after training; call push_to_hub() for more.",
}
#: {field: further values that ask for what is so anyway}, as many scripts do.
HARMLESS = {
    "ddp_find_unused_parameters": (False,),
    "ddp_broadcast_buffers": (False,),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {}),
    "label_names": ([],),
    "neftune_noise_alpha": (0,),
}
#: {field: (values that act, what to do instead)}, beside the default.
SOME_WITHOUT_EFFECT = {
    "hub_strategy": (("end",), "save_model pushes once, after training: leave it out or set 'end'."),
}
#: Beginnings of optimizers' names that need hooks of transformers' own training step.
OPTIMIZERS_WITHOUT_STEP = ("galore", "apollo", "lomo", "adalomo", "schedule_free")

_AS_FILLED_IN = {
    "include_num_input_tokens_seen": "no",
    "accelerator_config": AcceleratorConfig(),
    "remove_unused_columns": None,
}


def check_inherited(config) -> None:
    """A ValueError where a config, after transformers' own checks, sets what nobody reads; of the fields that a method
    inherits from ours, its config's `without_effect` says which these are."""
    without_effect = WITHOUT_EFFECT | config.without_effect
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        allowed, instead = SOME_WITHOUT_EFFECT.get(name, ((), without_effect.get(name)))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if name == "data_seed" and value == config.seed:
            continue
        if instead and value not in (default, _AS_FILLED_IN.get(name, default), *allowed, *HARMLESS.get(name, ())):
            raise ValueError(f"{name}={value!r} is not supported: {instead}")
    if config.optim.startswith(OPTIMIZERS_WITHOUT_STEP):
        raise ValueError(
            f"optim={str(config.optim.value)!r} needs a training step of transformers that is not used here: use "
            "adamw_torch, sgd, adafactor or another optimizer that only needs gradients."
        )
