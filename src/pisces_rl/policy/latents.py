"""From videos to the latents of a pipeline's scheduler, learned from the pipeline itself.

After the last step a pipeline maps its latents to what its VAE decodes: it unpacks, reorders and rescales, each in its
own way. That map is affine with one input an output, z_k = a_k x_{p(k)} + b_k, so a few probes through the pipeline's
own code give a, b and p, and its inverse turns encoded videos into latents. No code here knows a model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .scheduler import PolicyError
from .session import LeavePipeline, Session, replaced_method

BASE = 8  # of the digits by which positions are sent through the pipeline; exact in bf16, too


@dataclass
class LatentCodec:
    """For one video: z = scale * x[source] + offset of flattened latents x and what the VAE decodes, z.

    Attributes:
        shape: of a video's latents, its rows first. encoded: of z, without the batch where clips are decoded whole.
        by_frame: frames are decoded one by one: z is (F, C, h, w); else (C, T, h, w).
    """

    shape: torch.Size
    encoded: torch.Size
    by_frame: bool
    source: Tensor
    scale: Tensor
    offset: Tensor

    @staticmethod
    @torch.no_grad()
    def of(policy, prompt: str = "") -> "LatentCodec":
        """Probe a policy's pipeline at its own size.

        Raises PolicyError where the map is not one-to-one and affine: then videos cannot be turned into latents.
        """
        shape = _Probe.run(policy, prompt, None).shape_of_latents
        count = shape.numel()

        def decoded(x: Tensor) -> Tensor:
            return _Probe.run(policy, prompt, x.view(shape)).z

        zero = decoded(torch.zeros(count))
        offset = zero.flatten()
        scale = decoded(torch.ones(count)).flatten() - offset
        if offset.numel() != count or not bool((scale != 0).all() and scale.isfinite().all()):
            raise PolicyError(
                f"{type(policy.pipeline).__name__} decodes {offset.numel()} numbers of {count} latents, so videos "
                "cannot be turned into its latents; train without videos."
            )
        source, power, index = torch.zeros(count, dtype=torch.long), 1, torch.arange(count)
        while power < count:
            digit = (index // power) % BASE
            found = ((decoded(digit.float()).flatten() - offset) / scale).round().long()
            source += found.clamp(0, BASE - 1) * power
            power *= BASE
        if not torch.equal(source.sort().values, index):
            raise PolicyError(
                f"{type(policy.pipeline).__name__} does more than reorder and rescale its latents before decoding, so "
                "videos cannot be turned into its latents; train without videos."
            )
        by_frame = zero.ndim == 4
        return LatentCodec(shape, zero.shape if by_frame else zero.shape[1:], by_frame, source, scale, offset)

    @torch.no_grad()
    def encode(self, pipeline, videos: Tensor) -> Tensor:
        """Latents (B * rows, ...) fp32, in the scheduler's layout, of videos (B, F, 3, H, W) in [0, 1]."""
        vae = pipeline.vae
        weight = next(vae.parameters())
        x = (videos * 2 - 1).to(weight.device, weight.dtype)
        x = x.flatten(0, 1) if self.by_frame else x.transpose(1, 2)
        z = vae.encode(x).latent_dist.mode().float()
        if self.by_frame:
            z = z.unflatten(0, (len(videos), -1))
        if z.shape[1:] != self.encoded:
            raise ValueError(
                f"videos {tuple(videos.shape)} encode to {tuple(z.shape[1:])} where {type(pipeline).__name__} makes "
                f"{tuple(self.encoded)}: give them the frames, height and width that it is called with."
            )
        source, scale, offset = (v.to(z.device) for v in (self.source, self.scale, self.offset))
        latents = torch.empty_like(z.flatten(1))
        latents[:, source] = (z.flatten(1) - offset) / scale
        return latents.view(len(videos) * self.shape[0], *self.shape[1:])


class _Probe(Session):
    """A run whose final latents are given, and whose VAE only looks at what it is to decode."""

    needs_prediction = False

    def __init__(self, policy, prompt: str, final: Tensor | None):
        super().__init__(policy, [prompt])
        self.given, self.shape_of_latents, self.seen = final, None, []

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.index += 1
        self.shape_of_latents = x.shape
        last = self.index == len(self.scheduler.timesteps)
        if last and self.given is None:
            raise LeavePipeline
        return self.given.to(x) if last else x

    @property
    def z(self) -> Tensor:
        return torch.cat(self.seen).float().cpu()

    def check_finished(self) -> None:
        pass

    @staticmethod
    def run(policy, prompt: str, final: Tensor | None) -> "_Probe":
        probe, vae = _Probe(policy, prompt, final), policy.pipeline.vae

        def look(decode, z: Tensor, *args, **kwargs):
            probe.seen.append(z.detach())
            if z.ndim == 5:
                raise LeavePipeline
            return decode(z, *args, **kwargs)

        with replaced_method(vae, "decode", look):
            policy._call_and_leave(probe, probe.prompts, [0], "pt")
        return probe
