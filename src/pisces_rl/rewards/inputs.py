"""Isolate rewards from each other: no reward can change what the next one sees or what is saved."""

import copy

import torch
from torch import Tensor

from .contract import RewardError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def own_lists(columns: dict[str, list]) -> dict[str, list]:
    """Copy columns so that a reward may change them without affecting others: their lists, and a list or dict per row.

    Anything nested deeper (a list in a row's list), arrays and tensors are shared: copying an image that is stored as
    nested lists would take longer than most rewards.
    """
    return {name: [_copied(value) for value in values] for name, values in columns.items()}


def _copied(value):
    return copy.copy(value) if type(value) in (list, dict) else value


class Untouched:
    """A check for writes into `videos` that needs no copy of them.

    The bits are summed as integers over rows and over columns, so the order of summation does not matter; this takes
    about twice the time of a mean. A tensor's version counter would not do: it misses writes through NumPy, and
    inference tensors have none.
    """

    def __init__(self, videos: Tensor):
        self.videos = videos
        self.before = self._sums()

    @torch.no_grad()
    def _sums(self) -> list[Tensor]:
        bits = self.videos.detach().view(_INTEGERS[self.videos.element_size()])
        return [bits.sum(dim, dtype=bits.dtype) for dim in (-1, -2)] if bits.ndim > 1 else [bits.clone()]

    def check(self, *names: str) -> None:
        """Raise a RewardError naming the given rewards if the videos have changed since construction."""
        if not all(map(torch.equal, self.before, self._sums())):
            raise RewardError(
                f"reward {' or '.join(map(repr, names))} wrote into `videos`, which the next reward and the saved "
                "samples would see; use a copy: videos.clone(), or 255 * videos instead of videos.mul_(255)."
            )
