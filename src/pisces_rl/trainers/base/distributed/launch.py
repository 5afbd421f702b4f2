"""Distribute a run over processes: shard weights with FSDP2 or ZeRO, split the tokens of each video."""

import os

from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from ....policy import VideoPolicy
from .sharded_optimizer import use_sharded_optimizer
from .zero import use_zero


def check_processes(args) -> None:
    """Raise a ValueError if a launcher started several processes that do not form a group."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, but no GPU was found, so they do not form a group: each would train "
            "a separate model. Set use_cpu=True (--use_cpu) to train on CPUs, or launch one process."
        )


def requested_sharding(args) -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP settings of `accelerate launch` or `args.fsdp`; None if FSDP is off.

    Raises:
        ValueError: FSDP1, or an FSDP option that is not supported.
    """
    if args.fsdp_plugin_args is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    settings = args.fsdp_plugin_args or {}
    version = int(settings.get("fsdp_version") or os.environ.get("FSDP_VERSION", 1))
    if version != 2:
        raise ValueError(
            f"fsdp_version={version}: FSDP1 flattens frozen weights and adapter into one tensor. Set fsdp_version: 2 "
            "under fsdp_config in the accelerate config file, or --fsdp_version 2."
        )
    # Every rank loads all weights. With this option on, transformers would leave text encoders empty on all ranks but
    # the first, for FSDP to fill them; but text encoders are not sharded.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    plugin = FullyShardedDataParallelPlugin(
        **settings | {"cpu_ram_efficient_loading": False, "auto_wrap_policy": "NO_WRAP"}
    )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=true: set it to false, and set gradient_checkpointing=True in the config, "
            "which checkpoints the denoiser's blocks."
        )
    return plugin


def spread_policy(
    policy: VideoPolicy,
    accelerator: Accelerator,
    args,
    sharding: FullyShardedDataParallelPlugin | None,
    zero_stage: int | None,
) -> None:
    """Share tokens, shard weights and optimizer as configured, and place the policy on its device.

    Args:
        policy: the policy that is trained.
        accelerator: the trainer's accelerator.
        args: a config.
        sharding: result of `requested_sharding`.
        zero_stage: result of `requested_zero`.
    """
    if args.context_parallel > 1:
        share_tokens_of_policy(policy, accelerator, args.context_parallel)
    if sharding is not None:
        shard_policy(policy, accelerator, sharding)
    if zero_stage is not None:
        use_zero(zero_stage, policy, accelerator, args.max_grad_norm)
    policy.place(accelerator.device, [kind for kind in args.offload or () if kind != "rewards"])
    # No DDP wrapper: the trainer averages the adapter's gradients once per optimizer step, and the pipeline may call
    # its denoisers in any way.
    prepare_model = accelerator.prepare_model
    accelerator.prepare_model = lambda model, **kwargs: prepare_model(
        model, **kwargs | {"evaluation_mode": True, "device_placement": False}
    )


def shard_policy(policy: VideoPolicy, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Shard the policy over all processes, and keep accelerate from sharding or wrapping it.

    With full fine-tuning this replaces the trained parameters.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy.shard(
        mesh,
        reshard_after_forward=plugin.reshard_after_forward,
        cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy) and accelerator.device.type != "cpu",
    )
    accelerator.state.distributed_type = PartialState().distributed_type
    if any(isinstance(p, DTensor) and p.requires_grad for p in policy.denoiser.parameters()):
        use_sharded_optimizer(accelerator)


def share_tokens_of_policy(policy: VideoPolicy, accelerator: Accelerator, degree: int) -> None:
    """Let groups of `degree` consecutive processes share the tokens of each video and read the same dataset rows."""
    parts = accelerator.num_processes // degree
    policy.share_tokens(
        init_device_mesh(accelerator.device.type, (parts, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
    )

    def prepare(dataloader, device_placement: bool | None = None, slice_fn_for_dispatch=None):
        prepared = prepare_data_loader(
            dataloader,
            accelerator.device,
            num_processes=parts,
            process_index=accelerator.process_index // degree,
            split_batches=accelerator.split_batches,
            put_on_device=bool(device_placement),
            rng_types=accelerator.rng_types.copy(),
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    accelerator.prepare_data_loader = prepare
