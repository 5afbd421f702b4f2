"""Texts of unequal lengths for denoisers that take no text mask (Kandinsky 5): one forward per length.

Such a denoiser attends to padding, so a video would depend on the other prompts of its batch, and replaying some rows
would give different numbers than sampling did. Here each row gets its text without padding, as if it were alone.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

TEXT, POSITIONS = "encoder_hidden_states", "text_rope_pos"


def takes_mask(denoiser: nn.Module) -> bool:
    """Return whether the denoiser takes a mask of the text tokens that are padding."""
    return any("mask" in name for name in inspect.signature(type(denoiser).forward).parameters)


def by_length(forward: Callable, agree: Callable[[int], int] = int, **kwargs):
    """Call `forward(**kwargs)` once per text length; trailing zeros in a row of `encoder_hidden_states` are padding.

    Args:
        forward: the denoiser's forward.
        agree: maps the number of forwards that this batch needs to the number to make, at least as many; if ranks
            share a sharded denoiser, that of the rank that needs most.
        kwargs: arguments of `forward`.
    """
    text = kwargs[TEXT]
    lengths = (text != 0).any(-1).sum(1).tolist()
    groups = [[row for row, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]
    count = agree(len(groups))
    if count == 1 and min(lengths) == text.shape[1]:
        return forward(**kwargs)
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        rows = groups[largest]
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    order, outputs, structure = [], [], None
    for rows in groups:
        length = lengths[rows[0]]
        part = {
            name: value[rows] if isinstance(value, Tensor) and name != POSITIONS else value
            for name, value in kwargs.items()
        }
        part[TEXT] = part[TEXT][:, :length]
        if POSITIONS in part:
            part[POSITIONS] = part[POSITIONS][:length]
        leaves, structure = tree_flatten(forward(**part))
        order += rows
        outputs.append(leaves)
    back = torch.tensor(order).argsort().to(text.device)
    return tree_unflatten([torch.cat(column)[back] for column in zip(*outputs, strict=True)], structure)
