"""Everything this package takes from TRL's private modules, in one place."""

import torch
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import RepeatSampler, identity


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with the order seeded by the epoch, so that a resumed run sees what the uninterrupted one saw.

    TRL's draws every epoch's order from one generator: after a resume in epoch 3 it would replay epoch 0's order.
    """

    def current_epoch(self) -> int:
        """Set by the trainer: the epoch that is about to begin."""
        return 0

    def __iter__(self):
        self.generator = torch.Generator().manual_seed((self.seed or 0) + 1_000_003 * self.current_epoch())
        return super().__iter__()


__all__ = ["EpochRepeatSampler", "_BaseConfig", "_BaseTrainer", "identity"]
