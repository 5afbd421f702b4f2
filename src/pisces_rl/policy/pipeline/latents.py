"""Encode videos as the latents of a pipeline's scheduler, with a map measured on the pipeline itself.

After the last step each pipeline unpacks, reorders and rescales its latents in its own way before its VAE decodes
them. That map is affine with one input per output, z_k = a_k x_{p(k)} + b_k, so a few probes through the pipeline's
own code give a, b and p, and the inverse turns encoded videos into latents. No code here is specific to a model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule.scheduler import PolicyError
from ..sessions.pipeline_call import run_until_left
from ..sessions.session import LeavePipeline, Session, replaced_method
from .conditions import Conditions
from .offload import device_of

BASE = 8  # of the digits that send positions through the pipeline; exact also in bf16
PROBE = 64.0  # input that finds the scale; large, so that in bf16 the offset's rounding hardly matters


@dataclass
class LatentCodec:
    """The map from a video's flattened latents x to the VAE's input z: z[free] = scale * x[source] + offset.

    Attributes:
        shape: shape of a video's latents; its rows are the first dimension.
        encoded: shape of z; without the batch dimension if the VAE decodes whole clips.
        by_frame: whether frames are decoded one by one: z is (F, C, h, w), otherwise (C, T, h, w).
        video: shape (F, 3, H, W) of the pipeline's videos.
        free: (z.numel(),) bool, the elements of z that the latents determine; False where a condition fixes them, for
            instance the first frame.
        source: (x.numel(),) index into x of each free element.
        scale: (x.numel(),).
        offset: (x.numel(),).
    """

    shape: torch.Size
    encoded: torch.Size
    by_frame: bool
    video: torch.Size
    free: Tensor
    source: Tensor
    scale: Tensor
    offset: Tensor

    @staticmethod
    @torch.no_grad()
    def of(policy, prompt: str = "", conditions: Conditions | None = None) -> "LatentCodec":
        """Probe a policy's pipeline at its own size, with the conditions of one video if it needs them.

        Raises:
            PolicyError: the map is not one-to-one and affine, so videos cannot be turned into latents.
        """
        shape = _Probe.run(policy, prompt, None, conditions).shape_of_latents
        count = shape.numel()

        def decoded(x: Tensor) -> Tensor:
            return _Probe.run(policy, prompt, x.view(shape), conditions).z

        zero = decoded(torch.zeros(count))
        offset = zero.flatten()
        scale = (decoded(torch.full((count,), PROBE)).flatten() - offset) / PROBE
        free = scale != 0
        if int(free.sum()) != count or not bool(scale.isfinite().all()):
            raise PolicyError(
                f"{type(policy.pipeline).__name__} decodes {int(free.sum())} numbers from {count} latents, so videos "
                "cannot be turned into its latents; train without videos."
            )
        source, power, index = torch.zeros(count, dtype=torch.long), 1, torch.arange(count)
        while power < count:
            digit = (index // power) % BASE
            found = ((decoded(digit.float()).flatten() - offset)[free] / scale[free]).round().long()
            source += found.clamp(0, BASE - 1) * power
            power *= BASE
        if not torch.equal(source.sort().values, index):
            raise PolicyError(
                f"{type(policy.pipeline).__name__} does more than reorder and rescale its latents before decoding, so "
                "videos cannot be turned into its latents; train without videos."
            )
        by_frame = zero.ndim == 4
        video = policy.sample([prompt], noise_seeds=[0], conditions=conditions).videos.shape[1:]
        encoded = zero.shape if by_frame else zero.shape[1:]
        return LatentCodec(shape, encoded, by_frame, video, free, source, scale[free], offset[free])

    def fitted(self, video: Tensor) -> Tensor:
        """Fit a video (F', 3, H', W') in [0, 1] to the pipeline's size: evenly spaced frames, cropped and resized."""
        frames, _, height, width = self.video
        take = torch.linspace(0, len(video) - 1, frames).round().long()
        return resized(video.float()[take], (height, width))

    @torch.no_grad()
    def encode(self, pipeline, videos: Tensor) -> Tensor:
        """Return latents (B * rows, ...), fp32 in the scheduler's layout, of videos (B, F, 3, H, W) in [0, 1]."""
        if videos.shape[1:] != self.video:
            expected = ", ".join(map(str, self.video))
            raise ValueError(
                f"videos: expected (B, {expected}), the size that {type(pipeline).__name__} makes here, got "
                f"{tuple(videos.shape)}; `fitted` converts a video to it."
            )
        vae = pipeline.vae
        x = (videos * 2 - 1).to(device_of(vae), next(vae.parameters()).dtype)
        x = x.flatten(0, 1) if self.by_frame else x.transpose(1, 2)
        z = vae.encode(x).latent_dist.mode().float()
        if self.by_frame:
            z = z.unflatten(0, (len(videos), -1))
        free, source, scale, offset = (v.to(z.device) for v in (self.free, self.source, self.scale, self.offset))
        z = z.flatten(1)[:, free]
        latents = torch.empty_like(z)
        latents[:, source] = (z - offset) / scale
        return latents.view(len(videos) * self.shape[0], *self.shape[1:])


def resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre-crop frames (F, 3, H, W) to the aspect ratio of `size` and resize them to it, in [0, 1]."""
    height, width = frames.shape[-2:]
    rows, columns = min(height, round(width * size[0] / size[1])), min(width, round(height * size[1] / size[0]))
    top, left = (height - rows) // 2, (width - columns) // 2
    frames = frames[..., top : top + rows, left : left + columns]
    if frames.shape[-2:] == size:
        return frames
    return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


class _Probe(Session):
    """A run with given final latents that records what the VAE would decode."""

    needs_prediction = False

    def __init__(self, policy, prompt: str, final: Tensor | None):
        super().__init__(policy, [prompt])
        self.given, self.shape_of_latents, self.seen = final, None, []

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.index += 1
        self.shape_of_latents = x.shape
        last = self.index == self.schedule.num_steps
        if last and self.given is None:
            raise LeavePipeline
        return self.given.to(x) if last else x

    @property
    def z(self) -> Tensor:
        return torch.cat(self.seen).float().cpu()

    def check_finished(self) -> None:
        pass

    @staticmethod
    def run(policy, prompt: str, final: Tensor | None, conditions: dict | None = None) -> "_Probe":
        probe, vae = _Probe(policy, prompt, final), policy.pipeline.vae
        probe.conditions = {name: value for name, (value,) in (conditions or {}).items()}

        def look(decode, z: Tensor, *args, **kwargs):
            probe.seen.append(z.detach())
            if z.ndim == 5:
                raise LeavePipeline
            return decode(z, *args, **kwargs)

        with replaced_method(vae, "decode", look):
            run_until_left(probe, [0], "pt")
        return probe
