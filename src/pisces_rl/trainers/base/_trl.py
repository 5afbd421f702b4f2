"""All imports from TRL's private modules, in one place."""

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import RepeatSampler, identity


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with the order seeded by the epoch, so that a resumed run sees the data of an uninterrupted one.

    TRL's sampler draws all epochs from one generator, so a run resumed in epoch 3 would repeat the order of epoch 0.
    """

    def current_epoch(self) -> int:
        """Return the epoch that is about to begin; the trainer replaces this method."""
        return 0

    def __iter__(self):
        self.generator = torch.Generator().manual_seed((self.seed or 0) + 1_000_003 * self.current_epoch())
        return super().__iter__()


class LoopOnlyTrainer(_BaseTrainer):
    """TRL's trainer reduced to its loop, hooks and settings: neither it nor transformers touches the model."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        for bar in (ProgressCallback, PrinterCallback):
            self.remove_callback(bar)
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False  # otherwise accelerate would wrap the policy

    def _send_telemetry(self) -> None:
        """Do nothing: TRL reads a language model's config here, and a diffusion policy has none."""

    def _wrap_model(self, model, training=True, dataloader=None):
        return model

    def _move_model_to_device(self, model, device) -> None:
        """Do nothing: `VideoPolicy.place` moves the model."""

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: Trainer would take one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)


__all__ = ["EpochRepeatSampler", "LoopOnlyTrainer", "_BaseConfig", "identity"]
