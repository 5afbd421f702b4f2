"""The policy that training begins with, and the one that the KL penalty keeps near."""

from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from ....policy import FullWeights, SavedAdapter, VideoPolicy, adapter_values, adapters_off, exchanged, held_values


class InitialPolicy:
    """The untrained policy and the reference: the base model, or one with the saved adapter that a run continues.

    Args:
        policy: that is trained. adapter: its trained parameters, before any step.
        continued: the saved adapter that they hold, or None: a new one, which changes nothing yet.
        reference: "base" or "adapter", of `continue_reference`.
    """

    def __init__(
        self, policy: VideoPolicy, adapter: dict[str, nn.Parameter], continued: SavedAdapter | None, reference: str
    ):
        self.policy, self.adapter, self.continued, self.kind = policy, adapter, continued, reference
        self.values = continued and {name: p.detach().clone() for name, p in adapter.items()}

    def untrained(self) -> AbstractContextManager:
        """Inside, the policy is what it was before training."""
        if self.values is None:
            return adapters_off(self.policy)
        self.values = {name: value.to(self.adapter[name].device) for name, value in self.values.items()}
        return adapter_values(self.adapter, self.values)

    def reference(self) -> AbstractContextManager:
        """Inside, the policy is the reference."""
        return adapters_off(self.policy) if self.kind == "base" else self.untrained()

    @property
    def identity(self) -> dict:
        """What a checkpoint must agree with."""
        if self.continued is None:
            return {}
        return {"continued": {"adapter": self.continued.digest, "reference": self.kind}}

    def card_settings(self, uses_reference: bool) -> dict[str, str]:
        """Rows of the model card; a folder by its last name only."""
        if self.continued is None:
            return {}
        source = self.continued.source
        name = Path(source).resolve().name if Path(source).exists() else source
        if not uses_reference:
            return {"continued from": name}
        reference = "the base model" if self.kind == "base" else "the adapter it was continued from"
        return {"continued from": name, "reference": reference}


class InitialWeights:
    """The same for denoisers that are trained whole: a copy of the weights that training begins with, in the host's
    memory, which changes places with the trained ones; where they lie in parts on several ranks, each keeps its part.

    Args:
        weights: trained parameters, before any step. trained: whose they are.
        kept: whether something will ask for them; else there is no copy.
    """

    def __init__(self, weights: dict[str, nn.Parameter], trained: FullWeights, kept: bool):
        self.weights, self.trained = weights, trained
        self.values = held_values(weights, "cpu") if kept else None

    def untrained(self) -> AbstractContextManager:
        """Inside, the policy is what it was before training; no graph may wait for the trained weights."""
        if self.values is None:
            raise RuntimeError(
                "no copy of the initial weights was kept, since neither the method, nor an auxiliary "
                "loss, nor an evaluation with sample videos asks for one (uses_reference)."
            )
        return exchanged(self.weights, self.values)

    reference = untrained

    @property
    def identity(self) -> dict:
        """What a checkpoint must agree with."""
        return {"full": sorted(self.trained.modules)}

    def card_settings(self, uses_reference: bool) -> dict[str, str]:
        """Rows of the model card."""
        dtype = str(next(iter(self.weights.values())).dtype).removeprefix("torch.")
        return {"trained": f"{self.trained.description}, saved in {dtype}"}
