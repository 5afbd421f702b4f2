"""What rewards that are one video-text encoder's share."""

import torch

from pisces_rl.rewards.encoders.encoder import VideoTextEncoder
from pisces_rl.rewards.offloaded_model import set_offload


class EncoderReward:
    """A differentiable reward whose weights are those of `encoder`."""

    differentiable = True
    encoder: VideoTextEncoder

    @property
    def offload(self) -> str | torch.device | None:
        """The encoder's, see `VideoTextEncoder`."""
        return self.encoder.offload

    @offload.setter
    def offload(self, device: str | torch.device | None) -> None:
        set_offload(self.encoder, self.encoder.offload, device)
        self.encoder.offload = device

    def to(self, device: str | torch.device):
        """Work on `device`, with weights that stay there, or wait as before; itself, as modules have it."""
        if self.encoder.offload is None:
            self.encoder.to(device)
        else:
            self.encoder.offload = device
        return self
