"""A denoiser whose frozen weights lie in parts on several ranks: each block is gathered when it runs.

Only the base is sharded, by torch's `fully_shard` (FSDP2). The adapter is small and stays whole on every rank, so that
its gradients, its file and its average are what they are without sharding. Gathering is a collective: every rank must
call the denoiser as often as every other.
"""

import torch
from torch import nn
from torch.distributed import DeviceMesh, ReduceOp, all_reduce
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from .execution import repeated_blocks


def shard(denoiser: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True,
          cpu_offload: bool = False) -> None:
    """Shard the frozen parameters of a denoiser over a mesh of one dimension; trainable ones are left alone.

    Args:
        mesh: of the ranks. Parts lie on its device, wherever the weights were before; one block moves at a time.
        reshard_after_forward: free a block's gathered weights after its forward and gather them again for backward;
            False keeps them, which is faster and needs the memory of the whole.
        cpu_offload: keep the parts in the memory of the CPU.
    """
    trained = {p for p in denoiser.parameters() if p.requires_grad}
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for module in [*reversed(repeated_blocks(denoiser)), denoiser]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=offload,
                    ignored_params=trained)  # fmt: skip
    for parameter in trained:
        parameter.data = parameter.data.to(mesh.device_type)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def largest_over_ranks(number: int, mesh: DeviceMesh) -> int:
    """The largest of the ranks' numbers."""
    value = torch.tensor(number, device=mesh.device_type)
    all_reduce(value, ReduceOp.MAX, group=mesh.get_group())
    return int(value)
