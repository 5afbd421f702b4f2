"""The policy that training begins with, and the one that the KL penalty keeps near."""

from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from ...policy import SavedAdapter, VideoPolicy, adapter_values, adapters_off


class InitialPolicy:
    """The untrained policy and the reference: the base model, or one with the saved adapter that a run continues.

    Args:
        policy: that is trained. adapter: its trained parameters, before any step.
        continued: the saved adapter that they hold, or None: a new one, which changes nothing yet.
        reference: "base" or "adapter", of `continue_reference`.
    """

    def __init__(self, policy: VideoPolicy, adapter: dict[str, nn.Parameter], continued: SavedAdapter | None,
                 reference: str):
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
