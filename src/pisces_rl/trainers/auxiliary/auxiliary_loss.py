"""Terms of the loss beside an algorithm's: each an object with its data, its settings and its state."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from transformers import TrainerCallback

from ...policy import VideoPolicy
from ...transitions import Paper


class AuxiliaryLoss(TrainerCallback):
    """A term that a trainer adds to its loss: weight times the mean of `loss` over a micro-batch.

    A subclass gives `name` and `loss`, and checks its arguments when it is made, before a model is loaded. The trainer
    also adds it as a callback: `on_step_end`, for instance, is called after each optimizer step. Each trainer works
    with a copy, so that one object serves several.

    Attributes:
        name: of the metric `{name}_loss`, of its time `seconds/{name}`, and of its state in a checkpoint.
        uses_reference: whether it asks the reference policy.
        papers: that the model card cites.
        weight: more than 0.
        batch_size: rows of a micro-batch on each process; None: per_device_train_batch_size.
    """

    name: str
    uses_reference = False
    papers: tuple[Paper, ...] = ()

    def __init__(self, weight: float, batch_size: int | None = None):
        if not weight > 0:
            raise ValueError(
                f"{type(self).__name__}: weight={weight} must be positive; to do without the term, leave it out of "
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
        """Called once by the trainer, before the first step.

        Args:
            policy: that is trained.
            adapter: its trained parameters.
            seed: of the run.
            image_columns: columns of data that condition the pipeline.
            reference: gives a context in which the policy is the reference, for instance without its adapter.
        """

    def loss(self, number: int, count: int, part: tuple[int, int] = (0, 1)) -> Tensor:
        """(count,) losses with gradients of a part (which, of how many) of the micro-batch of that number."""
        raise TypeError(f"{type(self).__name__} has no loss: define loss(number, count, part).")

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take the state of a checkpoint, whose adapter is loaded."""

    def restart(self) -> None:
        """Begin anew from the present adapter: it was loaded without a state, or the best model has replaced it."""

    def card_settings(self) -> dict[str, str]:
        """Rows of the model card."""
        return {f"auxiliary loss {self.name}": f"weight {self.weight}"}


def check_auxiliary_losses(losses) -> None:
    """A ValueError where these are no auxiliary losses, or two have one name."""
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
        raise ValueError(f"auxiliary_losses: {nameless[0]} has no `name`, by which it is logged and saved.")
    names = [loss.name for loss in losses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"auxiliary_losses: several are named {twice}; set another `name` on each.")
