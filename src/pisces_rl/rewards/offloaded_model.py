"""A reward whose model waits in the host's memory between calls."""

import contextlib
from collections.abc import Iterator

import torch

from pisces_rl.rewards.encodings import leave_for_backward


class OffloadedModel:
    """For rewards with an attribute `model`, which they use inside `working`."""

    _offload: str | torch.device | None = None

    @property
    def offload(self) -> str | torch.device | None:
        """Where the model works while its weights lie on the CPU between calls; None: they stay where it works."""
        return self._offload

    @offload.setter
    def offload(self, device: str | torch.device | None) -> None:
        set_offload(self.model, self._offload, device)
        self._offload = device

    def to(self, device: str | torch.device):
        """Work on `device`, with weights that stay there, or wait as before; itself, as modules have it."""
        if self._offload is None:
            self.model.to(device)
        else:
            self._offload = device
        return self

    @contextlib.contextmanager
    def working(self, graph: bool = False) -> Iterator[None]:
        """Inside, the weights are where the model works; afterwards they go back to the CPU if it offloads.

        Args:
            graph: a graph is left that needs them: then they go back after a panel's backward pass, or, without a
                panel that has one, after the next call without a graph.
        """
        if self._offload is None:
            yield
            return
        self.model.to(self._offload)
        left = False
        try:
            yield
            left = graph
        finally:
            if left:
                leave_for_backward(self.model)
            else:
                self.model.to("cpu")


def set_offload(model, before: str | torch.device | None, after: str | torch.device | None) -> None:
    """The weights go where a new value of `offload` has them: to the CPU; or back to the device where the model worked
    if it no longer offloads."""
    if after is not None:
        model.to("cpu")
    elif before is not None:
        model.to(before)


def first_device(device: str | torch.device | None, offload: str | torch.device | None) -> str | torch.device:
    """Where a model is loaded to: `device` if given, else CUDA if there is one and the model does not offload."""
    return device or ("cuda" if torch.cuda.is_available() and offload is None else "cpu")
