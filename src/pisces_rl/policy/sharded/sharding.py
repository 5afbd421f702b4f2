"""Run a denoiser on several ranks: shard its weights, with each block gathered when it runs, or split its tokens.

torch's `fully_shard` (FSDP2) shards everything except adapters: frozen weights, and those of full fine-tuning, whose
gradients backward averages over the ranks, leaving each its part. An adapter is small and stays whole on every rank,
so its gradients, its file and its average are the same as without sharding. Gathering is a collective: all ranks must
call the denoiser, and backward, equally often.
"""

import contextlib
from collections.abc import Iterator

import torch
from diffusers import ContextParallelConfig
from torch import nn
from torch.distributed import DeviceMesh, ReduceOp, all_reduce
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from ..fast.execution import repeated_blocks
from ..schedule.scheduler import PolicyError


def shard(
    denoiser: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True, cpu_offload: bool = False
) -> None:
    """Shard the parameters of a denoiser, except adapters, over a one-dimensional mesh.

    Sharded parameters are replaced by DTensors, so collect trained parameters (for an optimizer) afterwards.

    Args:
        denoiser: the denoiser.
        mesh: mesh of the ranks. Parts are placed on its device, wherever the weights were; one block moves at a time.
        reshard_after_forward: free a block's gathered weights after its forward and gather them again for backward;
            False keeps them, which is faster but needs memory for all weights.
        cpu_offload: keep the parts in CPU memory.
    """
    adapter = {p for name, p in denoiser.named_parameters() if "lora_" in name}
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for module in [*reversed(repeated_blocks(denoiser)), denoiser]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload,
            ignored_params=adapter,
        )
    for parameter in adapter:
        parameter.data = parameter.data.to(mesh.device_type)


def share_tokens(denoiser: nn.Module, mesh: DeviceMesh) -> None:
    """Split each video's tokens over the ranks of the mesh's dimension "ulysses", by diffusers' context parallelism.

    Attention switches to a split by heads and back (DeepSpeed-Ulysses, arXiv 2309.14509). Each of these ranks then has
    the gradient from its own tokens; their sum is the video's gradient.

    Args:
        denoiser: the denoiser.
        mesh: has the dimensions "ring", of size 1, and "ulysses".

    Raises:
        PolicyError: diffusers has no plan for the class, or its heads cannot be divided.
    """
    name, degree = type(denoiser).__name__, mesh["ulysses"].size()
    if denoiser._cp_plan is None:
        raise PolicyError(
            f"context_parallel={degree}: diffusers has no plan (_cp_plan) to split tokens of {name}; leave it at 1."
        )
    heads = denoiser.config.num_attention_heads
    if heads % degree:
        raise PolicyError(f"context_parallel={degree} must divide the {heads} attention heads of {name}.")
    denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))


@contextlib.contextmanager
def tokens_divide() -> Iterator[None]:
    """Translate diffusers' error about a tensor that cannot be divided into a PolicyError."""
    try:
        yield
    except AssertionError as error:
        if "divisible by mesh size" not in str(error):
            raise
        raise PolicyError(
            "context_parallel: a video's tokens cannot be divided equally among its ranks; choose height, width and "
            "num_frames so that the number of latent patches is a multiple of context_parallel."
        ) from error


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are sharded, by FSDP2 or DeepSpeed."""
    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters())


def largest_over_ranks(number: int, mesh: DeviceMesh) -> int:
    """Return the largest of the ranks' numbers."""
    value = torch.tensor(number, device=mesh.device_type)
    all_reduce(value, ReduceOp.MAX, group=mesh.get_group())
    return int(value)
