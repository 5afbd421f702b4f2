"""Base class of auxiliary losses: objects that hold their data, settings and state."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ...policy import VideoPolicy
from ...transitions import Paper


class AuxiliaryLoss(TrainerCallback):
    """A term that a trainer adds to its loss: weight times the mean of `loss` over a micro-batch.

    A subclass defines `name` and `loss`, and checks its arguments in `__init__`, before a model is loaded. The trainer
    also registers it as a callback, so `on_step_end`, for instance, is called after each optimizer step. Each trainer
    works with a copy, so one object can be passed to several trainers.

    Attributes:
        name: names the metric `{name}_loss`, the time `seconds/{name}`, and the state in a checkpoint.
        uses_reference: whether the loss needs the reference policy.
        papers: papers that the model card cites.
        weight: factor of the term, greater than 0.
        batch_size: rows of a micro-batch on each process; None: per_device_train_batch_size.
    """

    name: str
    uses_reference = False
    papers: tuple[Paper, ...] = ()

    def __init__(self, weight: float, batch_size: int | None = None):
        if not weight > 0:
            raise ValueError(
                f"{type(self).__name__}: weight={weight} must be positive; to disable the term, leave it out of "
                "auxiliary_losses."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"{type(self).__name__}: batch_size={batch_size} must be at least 1, or None.")
        self.weight, self.batch_size = weight, batch_size

    def begin(
        self,
        policy: VideoPolicy,
        adapter: dict[str, nn.Parameter],
        *,
        seed: int,
        image_columns: Sequence[str],
        reference: Callable[[], AbstractContextManager],
    ) -> None:
        """Prepare for training; the trainer calls this once, before the first step.

        Args:
            policy: the policy that is trained.
            adapter: its trained parameters.
            seed: seed of the run.
            image_columns: dataset columns that condition the pipeline.
            reference: returns a context in which the policy is the reference, for instance without its adapter.
        """

    def loss(self, number: int, count: int, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Return the losses of this process's part of a micro-batch, (count,), with gradients.

        Args:
            number: index of the micro-batch.
            count: rows of the part.
            part: (index of the part, number of parts).
        """
        raise TypeError(f"{type(self).__name__} has no loss: define loss(number, count, part).")

    def state_dict(self) -> dict:
        """Return the state to save in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from a checkpoint; the trainer has loaded its adapter."""

    def restart(self) -> None:
        """Reset the state to the current adapter, which was loaded without a state or is the best model."""

    def card_settings(self) -> dict[str, str]:
        """Return rows of the model card."""
        return {f"auxiliary loss {self.name}": f"weight {self.weight}"}


def check_auxiliary_losses(losses: Any) -> None:
    """Raise a ValueError unless `losses` is a list of auxiliary losses with distinct names."""
    several = isinstance(losses, (list, tuple))
    if wrong := [
        type(loss).__name__
        for loss in (losses if several else [losses])
        if not several or not isinstance(loss, AuxiliaryLoss)
    ]:
        raise ValueError(
            f"auxiliary_losses {'holds' if several else 'is'} a {wrong[0]}; pass a list of AuxiliaryLoss objects, for "
            "instance [ConsistencyDistillation(videos, weight=0.1)]."
        )
    if nameless := [type(loss).__name__ for loss in losses if not isinstance(getattr(loss, "name", None), str)]:
        raise ValueError(f"auxiliary_losses: {nameless[0]} has no `name`; define one, for logs and checkpoints.")
    names = [loss.name for loss in losses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"auxiliary_losses: several are named {twice}; set a different `name` on each.")
