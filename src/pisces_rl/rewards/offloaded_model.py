"""A reward whose model waits in the host's memory between calls."""

import torch


class OffloadedModel:
    """For rewards with an attribute `model`."""

    _offload: str | torch.device | None = None

    @property
    def offload(self) -> str | torch.device | None:
        """Where the model works while its weights lie on the CPU between calls; None: it stays where it is."""
        return self._offload

    @offload.setter
    def offload(self, device: str | torch.device | None) -> None:
        self._offload = device
        self.model.to("cpu")

    def to(self, device: str | torch.device):
        """Work on `device`, with weights that stay there, or wait as before; itself, as modules have it."""
        if self._offload is None:
            self.model.to(device)
        else:
            self._offload = device
        return self
