"""Everything this package takes from TRL's private modules, in one place."""

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
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


class LoopOnlyTrainer(_BaseTrainer):
    """TRL's trainer without what it and transformers do to a model: the loop, its hooks and its settings are left."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        for bar in (ProgressCallback, PrinterCallback):
            self.remove_callback(bar)
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False  # they would have accelerate wrap the policy

    def _send_telemetry(self) -> None:
        """TRL's reads a language model's config; a diffusion policy has none."""

    def _wrap_model(self, model, training=True, dataloader=None):
        return model

    def _move_model_to_device(self, model, device) -> None:
        """`VideoPolicy.place` moves what is to be there."""

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended: Trainer takes one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)


__all__ = ["EpochRepeatSampler", "LoopOnlyTrainer", "_BaseConfig", "identity"]
