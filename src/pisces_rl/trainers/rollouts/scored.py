"""A process's share of a rollout, with advantages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...policy import Rollout


@dataclass
class ScoredRollout:
    """One process's share of a rollout: n videos with their advantages, ready for the update.

    Attributes:
        parts: list of (rows of this share, their samples), one entry per set of trained steps.
        advantages: (n,) advantages, on the CPU.
        spread: (n,) bool, whether the rewards of the video's group differ or, with running statistics, the advantage
            is not 0.
        ranked: (n,) bool, whether the video has a reward and the rewards of its group differ.
        number: index of the rollout, from 0.
        drawn_at: optimizer step at which the rollout was drawn.
        first_row: row of this share's first video in the whole rollout.
        micro_batches: rows of each micro-batch.
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
        """The samples of all videos, which must have the same trained steps."""
        return Rollout.cat([samples for _, samples in self.parts])

    def each(self, rows: Sequence[int]) -> Iterator[tuple[Rollout, list[int], list[int]]]:
        """Yield (samples, rows in samples, the same rows in this share) of each part that contains some of `rows`."""
        for own, samples in self.parts:
            places = {row: place for place, row in enumerate(own)}
            mine = [row for row in rows if row in places]
            if mine:
                yield samples, [places[row] for row in mine], mine
