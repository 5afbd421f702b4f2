"""Common part of scorers of single images: frame selection, preprocessing, batching and offloading."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pisces_rl.rewards.contract import check_inputs, check_pixels
from pisces_rl.rewards.encoders.frames import CLIP_MEAN, CLIP_STD
from pisces_rl.rewards.offloaded_model import OffloadedModel


def spread(count: int, frames: int) -> Tensor:
    """Return (min(count, frames),) indices of evenly spaced frames, first and last included."""
    return torch.linspace(0, count - 1, min(frames, count)).round().long()


def at_least_float(x: Tensor) -> Tensor:
    """Convert to fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale(frames: Tensor, size: tuple[int, int], *, passes: bool = True) -> Tensor:
    """Resize frames (n, 3, H, W), bicubic with antialiasing, and clamp to [0, 1]. With `passes`, also clamp between
    the passes over columns and rows, as PIL does but torchvision does not."""
    for now in ((frames.shape[-2], size[1]), size) if passes else (size,):
        if frames.shape[-2:] != now:
            frames = F.interpolate(frames, now, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return frames


def clip_pixels(frames: Tensor, size: int, *, crop_rounds: bool = False) -> Tensor:
    """Apply CLIP's preprocessing to frames (n, 3, H, W) in [0, 1], differentiably: (n, 3, size, size).

    The shorter side is scaled to `size` (bicubic with antialiasing, the longer side rounded down), the centre cropped,
    and pixels normalised by CLIP's mean and standard deviation. The processors do the same on 8-bit images and round
    after each of the two passes of the scaling, so they differ by up to about 2/255 per pixel.

    Args:
        frames: (n, 3, H, W) in [0, 1].
        size: side of the result.
        crop_rounds: if the margin is odd, round half of it to the nearest even number (torchvision, the original CLIP)
            instead of down (transformers).
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    scaled = (int(size * height / short), int(size * width / short))
    frames = frames.clamp(0, 1)
    frames = scale(frames, scaled)
    top, left = (round((side - size) / 2) if crop_rounds else (side - size) // 2 for side in scaled)
    frames = frames[..., top : top + size, left : left + size]
    mean, std = (frames.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (frames - mean) / std


class FrameScorer(OffloadedModel, ABC):
    """A video's score is the mean of its frames' scores; differentiable.

    A video of one frame has the authors' score of that image; the authors define no score for videos.

    Args:
        model: frozen by this class.
        size: side of the preprocessed frames.
        frames: frames to score, evenly spaced, first and last included.
        micro_batch: frames per forward pass.
        name: under which it is logged.
        offload: the device, such as "cuda", on which the model computes while its weights stay on the CPU between
            calls. A call that leaves a graph leaves them on the device; in a panel, until its backward pass.
    """

    differentiable = True
    crop_rounds = False

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int,
        frames: int,
        micro_batch: int,
        name: str,
        offload: str | torch.device | None,
    ):
        if frames < 1 or micro_batch < 1:
            raise ValueError(f"frames={frames}, micro_batch={micro_batch}: both must be at least 1.")
        self.model, self.size = model.eval().requires_grad_(False), size
        self.frames, self.micro_batch, self.__name__ = frames, micro_batch, name
        if offload is not None:
            self.offload = offload

    @abstractmethod
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Return what the scorer needs of the prompts, (B, ...)."""

    @abstractmethod
    def look(self, pixels: Tensor, texts: Tensor) -> Tensor:
        """Return (n,) scores of preprocessed frames (n, 3, size, size), each with its row of `read`."""

    def __call__(self, prompts: Sequence[str], videos: Tensor, **columns) -> Tensor:
        """Return (B,) scores of videos (B, F, 3, H, W) in [0, 1], on their device.

        Raises TypeError and ValueError as `check_inputs` and `check_pixels` do.
        """
        check_inputs(prompts, videos)
        check_pixels(videos)
        graph = torch.is_grad_enabled() and videos.requires_grad
        frames = videos[:, spread(videos.shape[1], self.frames)]
        rows = torch.arange(len(videos)).repeat_interleave(frames.shape[1])
        with self.working(graph), torch.set_grad_enabled(graph):
            parameter = next(self.model.parameters())
            texts, scores = self.read(prompts), []
            for part, row in zip(frames.flatten(0, 1).split(self.micro_batch), rows.split(self.micro_batch)):
                part = at_least_float(part.to(parameter.device, torch.promote_types(part.dtype, parameter.dtype)))
                pixels = clip_pixels(part, self.size, crop_rounds=self.crop_rounds)
                scores.append(self.look(pixels.to(parameter.dtype), texts[row.to(texts.device)]))
        scores = torch.cat(scores)
        return scores.unflatten(0, (len(videos), -1)).mean(1).to(videos.device)
