"""What a reward is given is its own, or stays as it is: what the next one sees, and what is saved, never changes."""

import copy

import torch
from torch import Tensor

from .contract import RewardError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def own_lists(columns: dict[str, list]) -> dict[str, list]:
    """Columns that a reward may change without another one seeing it: their lists, and a row's own list or dict.

    What lies deeper (a list in a row's list), arrays and tensors are shared: copying an image that is stored as nested
    lists would take longer than most rewards.
    """
    return {name: [_own(value) for value in values] for name, values in columns.items()}


def _own(value):
    return copy.copy(value) if type(value) in (list, dict) else value


class Untouched:
    """Tells whether anything writes into `videos`, without a copy of them.

    The bits are added up over rows and over columns, in integers, so that any order of the sum gives the same: about
    twice the time of a mean. A tensor's version counter would not do: it misses what is written through NumPy, and
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
        """A RewardError that names the rewards where something has been written since the start."""
        if not all(map(torch.equal, self.before, self._sums())):
            raise RewardError(
                f"reward {' or '.join(map(repr, names))} wrote into `videos`, which the next reward and the saved "
                "samples would see; give it a copy: videos.clone(), or 255 * videos instead of videos.mul_(255)."
            )
