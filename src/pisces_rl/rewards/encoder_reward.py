"""Common part of rewards that use one video-text encoder."""

import torch

from pisces_rl.rewards.encoders.encoder import VideoTextEncoder
from pisces_rl.rewards.offloaded_model import set_offload


class EncoderReward:
    """A differentiable reward whose only weights are those of `encoder`."""

    differentiable = True
    encoder: VideoTextEncoder

    @property
    def offload(self) -> str | torch.device | None:
        """The encoder's `offload`, see `VideoTextEncoder`."""
        return self.encoder.offload

    @offload.setter
    def offload(self, device: str | torch.device | None) -> None:
        set_offload(self.encoder, self.encoder.offload, device)
        self.encoder.offload = device

    def to(self, device: str | torch.device):
        """Compute on `device` from now on, with the weights there or, if offloading, on the CPU between calls; return
        self, as modules do."""
        if self.encoder.offload is None:
            self.encoder.to(device)
        else:
            self.encoder.offload = device
        return self
