"""Inherited settings that would have no effect, and what to use instead of each.

They come from transformers and TRL, and belong to training steps, evaluations, samplers and wrappers that these
trainers replace; or from a config's base class, and the method does not use them. `tests/strangers/test_settings.py`
classifies every field of the configs, so it fails if a new transformers adds one.
"""

from dataclasses import MISSING, fields

from transformers.trainer_pt_utils import AcceleratorConfig

#: {field: what to do instead}. Every value except the default is an error.
WITHOUT_EFFECT = {
    # language models
    "label_smoothing_factor": "there are no labels to smooth; leave it 0.",
    "label_names": "there are no labels; every column of the dataset reaches the rewards.",
    "neftune_noise_alpha": "there is no embedding layer to add noise to; noise_level sets GRPO's exploration noise.",
    "average_tokens_across_devices": "there are no tokens to count: every video has the same weight in the loss.",
    "include_num_input_tokens_seen": "there are no tokens to count; the log has the epoch and the step.",
    "use_cache": "a denoiser has no key-value cache; prompts are encoded only once anyway.",
    "use_liger_kernel": "Liger's kernels are for language models; set torch_compile=True or attention_kernel.",
    "liger_kernel_config": "Liger's kernels are for language models; set torch_compile=True or attention_kernel.",
    # data
    "remove_unused_columns": "it would hide the columns from the rewards; remove them from the dataset instead.",
    "train_sampling_strategy": "prompts are shuffled or, with shuffle_dataset=False, kept in the dataset's order.",
    "length_column_name": "all videos have the same length, num_frames.",
    "data_seed": "seed also sets the data order; set seed, or shuffle the dataset with another seed.",
    "dataloader_in_order": "batches out of order would split the groups of a prompt.",
    "accelerator_config": "the trainer divides the batches among processes itself; leave it unset.",
    # evaluation
    "prediction_loss_only": "an evaluation samples videos and scores them; it has no loss.",
    "eval_accumulation_steps": "scores are gathered once per dataset; lower per_device_eval_batch_size.",
    "eval_do_concat_batches": "there are no predictions to join; evaluations/ holds the scores of each prompt.",
    "eval_use_gather_object": "scores are always gathered as objects.",
    "include_for_metrics": "metrics come from rewards and judges, which get the prompts, the videos and all columns.",
    "batch_eval_metrics": "metrics come from rewards and judges; add a metric to judge_funcs.",
    "bf16_full_eval": "evaluation uses the precision of training; set bf16=True.",
    "fp16_full_eval": "evaluation uses the precision of training; set bf16=True.",
    # memory and speed
    "auto_find_batch_size": "it would change the batch size during training; lower per_device_train_batch_size.",
    "torch_empty_cache_steps": "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, or offload.",
    "activation_checkpointing_kwargs": "denoisers checkpoint their own blocks, without options; leave it unset.",
    "gradient_checkpointing_kwargs": "denoisers checkpoint their own blocks, without options; leave it unset.",
    "optim_target_modules": "GaLore and APOLLO are for full matrices, and an adapter is small; use adamw_torch.",
    # many processes
    "ddp_find_unused_parameters": "no DDP wrapper is used; the adapter's gradients are averaged once per step.",
    "ddp_bucket_cap_mb": "no DDP wrapper is used; the adapter's gradients are averaged once per step.",
    "ddp_broadcast_buffers": "no DDP wrapper is used; the adapter's gradients are averaged once per step.",
    "ddp_static_graph": "no DDP wrapper is used; the adapter's gradients are averaged once per step.",
    "parallelism_config": "set context_parallel, or launch with FSDP2 or DeepSpeed (docs/processes.md).",
    # checkpoints and the Hub
    "enable_jit_checkpoint": "a kill could leave half a checkpoint; set save_steps, and resume from the last one.",
    "hub_always_push": "save_model pushes once, after training; call push_to_hub() to push more often.",
}
#: {field: further allowed values, which ask for the behaviour that holds anyway}. Many scripts set them.
HARMLESS = {
    "ddp_find_unused_parameters": (False,),
    "ddp_broadcast_buffers": (False,),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {}),
    "label_names": ([],),
    "neftune_noise_alpha": (0,),
}
#: {field: (allowed values besides the default, what to do instead of others)}.
SOME_WITHOUT_EFFECT = {
    "hub_strategy": (("end",), "save_model pushes once, after training; leave it out or set 'end'."),
}
#: Prefixes of optimizers that need hooks in transformers' training step.
OPTIMIZERS_WITHOUT_STEP = ("galore", "apollo", "lomo", "adalomo", "schedule_free")

_AS_FILLED_IN = {
    "include_num_input_tokens_seen": "no",
    "accelerator_config": AcceleratorConfig(),
    "remove_unused_columns": None,
}


def check_inherited(config) -> None:
    """Raise a ValueError if a config sets a field that has no effect, or an inherited one out of range.

    Call it after transformers' checks. A method's config lists fields of our base classes that it does not use in
    `without_effect`.
    """
    without_effect = WITHOUT_EFFECT | config.without_effect
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        allowed, instead = SOME_WITHOUT_EFFECT.get(name, ((), without_effect.get(name)))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if name == "data_seed" and value == config.seed:
            continue
        if instead and value not in (default, _AS_FILLED_IN.get(name, default), *allowed, *HARMLESS.get(name, ())):
            raise ValueError(f"{name}={value!r} is not supported: {instead}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number of at least 0.")
    if config.optim.startswith(OPTIMIZERS_WITHOUT_STEP):
        raise ValueError(
            f"optim={str(config.optim.value)!r} needs transformers' training step, which is not used here: use "
            "adamw_torch, sgd, adafactor or another optimizer that needs only gradients."
        )
