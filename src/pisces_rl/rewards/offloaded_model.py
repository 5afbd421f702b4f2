"""A reward whose model stays in host memory between calls."""

import contextlib
from collections.abc import Iterator

import torch

from pisces_rl.rewards.encodings import leave_for_backward


class OffloadedModel:
    """Mixin for rewards with an attribute `model` that they use inside `working`."""

    _offload: str | torch.device | None = None

    @property
    def offload(self) -> str | torch.device | None:
        """The device the model computes on while its weights stay on the CPU between calls; None: no offloading."""
        return self._offload

    @offload.setter
    def offload(self, device: str | torch.device | None) -> None:
        set_offload(self.model, self._offload, device)
        self._offload = device

    def to(self, device: str | torch.device):
        """Compute on `device` from now on, with the weights there or, if offloading, on the CPU between calls; return
        self, as modules do."""
        if self._offload is None:
            self.model.to(device)
        else:
            self._offload = device
        return self

    @contextlib.contextmanager
    def working(self, graph: bool = False) -> Iterator[None]:
        """Within the block, keep the weights on the model's device; afterwards they return to the CPU if it offloads.

        Args:
            graph: the block leaves a graph that needs the weights. They then return after a panel's backward pass or,
                without such a panel, after the next call without a graph.
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
    """Move weights after `offload` changed: to the CPU, or back to the model's device if it no longer offloads."""
    if after is not None:
        model.to("cpu")
    elif before is not None:
        model.to(before)


def first_device(device: str | torch.device | None, offload: str | torch.device | None) -> str | torch.device:
    """Return where to load a model: `device` if given, else CUDA if available and the model does not offload."""
    return device or ("cuda" if torch.cuda.is_available() and offload is None else "cpu")
