"""Convert between whole tensors and the parts of sharded trained weights that a process holds.

Averages, copies and the reference are kept as parts, in plain tensors; files hold whole tensors. A parameter that is
not a DTensor is its own part, and these functions change nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, get_node_local_rank
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def held(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing memory, detached; all of it if not a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def held_values(parameters: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Return copies of the parts that this process holds, on `device` or each on its own."""
    return {name: held(p).to(p.device if device is None else device, copy=True) for name, p in parameters.items()}


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that matches this process's part of `like`, on its device; a plain tensor."""
    return held(distribute(whole, like)) if isinstance(like, DTensor) else whole.to(like.device)


def distribute(whole: Tensor, like: DTensor) -> DTensor:
    """Shard a whole tensor, which every rank has, like `like`."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def gathered(part: Tensor, like: Tensor) -> Tensor | None:
    """Gather a whole tensor from the parts of `like`'s ranks, as a copy in host memory.

    This is a collective. The first process of each machine, which writes files, gets the tensor; the others get None.
    If `like` is not sharded, `part` is returned as it is.
    """
    if not isinstance(like, DTensor):
        return part
    whole = DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()
    return whole.to("cpu", copy=True) if get_node_local_rank(fallback_rank=0) == 0 else None


def gathered_values(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gather each value with `gathered`, one at a time."""
    return {name: gathered(value, like[name]) for name, value in values.items()}


def parts_of_values(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `part_of` each value."""
    return {name: part_of(values[name], parameter) for name, parameter in like.items()}


@torch.no_grad()
def norm(tensors: list[Tensor]) -> Tensor:
    """Return sqrt(sum_i |t_i|^2), a scalar; a collective if the tensors are DTensors, which must share one mesh."""
    own = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([held(t) for t in tensors])))
    if isinstance(tensors[0], DTensor):
        own = own.square()
        all_reduce(own, ReduceOp.SUM, group=tensors[0].device_mesh.get_group())
        own = own.sqrt()
    return own
