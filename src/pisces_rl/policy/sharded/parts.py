"""Trained weights in parts on several ranks: what this process holds of them, and whole tensors.

Averages, copies and the reference are kept part by part, as plain tensors; files hold whole ones. A parameter that is
no DTensor is held whole, and these functions change nothing.
"""

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, get_node_local_rank
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory and without a graph: a DTensor's part, or the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def held_values(parameters: dict[str, Tensor], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Copies of what this process holds of each, on a device or where it is."""
    return {name: held(p).to(p.device if device is None else device, copy=True) for name, p in parameters.items()}


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`, on its device; a plain tensor."""
    return held(distribute(whole, like)) if isinstance(like, DTensor) else whole.to(like.device)


def distribute(whole: Tensor, like: DTensor) -> DTensor:
    """A whole tensor, which every rank has, in parts like those of `like`."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def gathered(part: Tensor, like: Tensor) -> Tensor | None:
    """The whole tensor of the parts of `like`'s ranks, of which this is one: a copy in the host's memory.

    It is a collective. Only the first process of each machine, which writes files, gets it; the others None. A part
    that is the whole is returned as it is.
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


def gathered_values(values: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """`gathered` of each, one at a time."""
    return {name: gathered(value, like[name]) for name, value in values.items()}


def parts_of_values(values: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """`part_of` each."""
    return {name: part_of(values[name], parameter) for name, parameter in like.items()}


@torch.no_grad()
def norm(tensors: list[Tensor]) -> Tensor:
    """sqrt(sum_i |t_i|^2), a scalar; a collective where they are DTensors, which then lie on one mesh."""
    own = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([held(t) for t in tensors])))
    if isinstance(tensors[0], DTensor):
        own = own.square()
        all_reduce(own, ReduceOp.SUM, group=tensors[0].device_mesh.get_group())
        own = own.sqrt()
    return own
