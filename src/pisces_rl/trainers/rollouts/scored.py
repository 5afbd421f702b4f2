"""A process's share of a rollout with what its videos are worth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...policy import Rollout


@dataclass
class ScoredRollout:
    """What an algorithm trains on.

    Attributes:
        parts: (rows of this share, their samples) for the videos that have the same trained steps.
        advantages: (n,) of this share's videos, on the CPU.
        spread: (n,) whether the rewards of a video's group differ, or with running statistics its reward from them.
        ranked: (n,) whether its reward places a video in its group: it has one, and the group's differ.
        number: of the rollout, from 0.
        drawn_at: the optimizer step before which it was drawn.
        first_row: the place of this share's first video in the whole rollout.
        micro_batches: the rows of each.
    """

    parts: list[tuple[list[int], Rollout]]
    advantages: Tensor
    spread: Tensor
    ranked: Tensor
    number: int
    drawn_at: int
    first_row: int
    micro_batches: list[list[int]]

    @property
    def samples(self) -> Rollout:
        """All videos; they must have the same trained steps."""
        return Rollout.cat([samples for _, samples in self.parts])

    def each(self, rows: Sequence[int]) -> Iterator[tuple[Rollout, list[int], list[int]]]:
        """(samples, rows in them, the same rows in this share) of each part that has some of `rows`, in order."""
        for own, samples in self.parts:
            places = {row: place for place, row in enumerate(own)}
            mine = [row for row in rows if row in places]
            if mine:
                yield samples, [places[row] for row in mine], mine
