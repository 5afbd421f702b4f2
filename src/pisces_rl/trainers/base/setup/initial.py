"""The policy that training starts from, and the reference policy of the KL penalty."""

from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from ....policy import FullWeights, SavedAdapter, VideoPolicy, adapter_values, adapters_off, exchanged, held_values


class InitialPolicy:
    """The untrained and the reference policy of a LoRA run: the base model without or with the saved adapter.

    Args:
        policy: the policy that is trained.
        adapter: its trained parameters, before any step.
        continued: the saved adapter that they hold; None for a new adapter, which does not change the model yet.
        reference: `continue_reference`, "base" or "adapter".
    """

    def __init__(
        self, policy: VideoPolicy, adapter: dict[str, nn.Parameter], continued: SavedAdapter | None, reference: str
    ):
        self.policy, self.adapter, self.continued, self.kind = policy, adapter, continued, reference
        self.values = continued and {name: p.detach().clone() for name, p in adapter.items()}

    def untrained(self) -> AbstractContextManager:
        """Return a context in which the policy has its weights from before training."""
        if self.values is None:
            return adapters_off(self.policy)
        self.values = {name: value.to(self.adapter[name].device) for name, value in self.values.items()}
        return adapter_values(self.adapter, self.values)

    def reference(self) -> AbstractContextManager:
        """Return a context in which the policy is the reference."""
        return adapters_off(self.policy) if self.kind == "base" else self.untrained()

    @property
    def identity(self) -> dict:
        """The part of a run's identity that a checkpoint must match."""
        if self.continued is None:
            return {}
        return {"continued": {"adapter": self.continued.digest, "reference": self.kind}}

    def card_settings(self, uses_reference: bool) -> dict[str, str]:
        """Return rows of the model card; of a folder only the last part of its path."""
        if self.continued is None:
            return {}
        source = self.continued.source
        name = Path(source).resolve().name if Path(source).exists() else source
        if not uses_reference:
            return {"continued from": name}
        reference = "the base model" if self.kind == "base" else "the adapter it was continued from"
        return {"continued from": name, "reference": reference}


class InitialWeights:
    """The untrained and the reference policy of full fine-tuning: a copy of the initial weights in host memory.

    The copy is exchanged with the trained weights. If weights are sharded, each rank keeps its part.

    Args:
        weights: trained parameters, before any step.
        trained: the object that owns them.
        kept: whether the initial weights will be needed; if not, no copy is kept.
    """

    def __init__(self, weights: dict[str, nn.Parameter], trained: FullWeights, kept: bool):
        self.weights, self.trained = weights, trained
        self.values = held_values(weights, "cpu") if kept else None

    def untrained(self) -> AbstractContextManager:
        """Return a context in which the policy has its initial weights; no autograd graph may be pending."""
        if self.values is None:
            raise RuntimeError(
                "no copy of the initial weights was kept, because neither the method (uses_reference), nor an "
                "auxiliary loss, nor an evaluation with sample videos needs one."
            )
        return exchanged(self.weights, self.values)

    reference = untrained

    @property
    def identity(self) -> dict:
        """The part of a run's identity that a checkpoint must match."""
        return {"full": sorted(self.trained.modules)}

    def card_settings(self, uses_reference: bool) -> dict[str, str]:
        """Return rows of the model card."""
        dtype = str(next(iter(self.weights.values())).dtype).removeprefix("torch.")
        return {"trained": f"{self.trained.description}, saved in {dtype}"}
