"""Optional: decode several latent frames at a time with a causal VAE, compiled; see benchmarks/decoder_speed.py."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..pipeline.quirks import CAUSAL_CHUNKS

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
VARIANTS = 64  # graphs of one decoder: first, second, further and last chunk, for each batch size


class ChunkedDecoder:
    """Replaces `_decode` of a VAE whose decoder keeps the last frames of each convolution's input for the next call.

    diffusers decodes one latent frame per call, which needs the least memory. Here the first frame is decoded alone,
    because it is not upsampled in time, and the others `frames` at a time. Convolutions, norms and attention see the
    same values, so only rounding changes. Calls that need gradients use the VAE's own method.

    Args:
        vae: the VAE.
        frames: latent frames per call, at least 1.
        compiled: whether `torch.compile` fuses the operations between convolutions; it compiles again at the first
            videos of each batch size.
        timed: whether cuDNN times its kernels for each shape and takes the fastest, with weights in channels-last
            order. It may choose others in the next process, which changes rounding.
    """

    def __init__(self, vae: nn.Module, frames: int, compiled: bool, timed: bool):
        self.vae, self.frames, self.own = vae, frames, type(vae)._decode.__get__(vae)
        self.compiled = torch.compile(vae.decoder, dynamic=False) if compiled else None
        self.timed = timed
        if timed:
            for weight in vae.decoder.parameters():
                if weight.ndim in CHANNELS_LAST:
                    weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])

    def __call__(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        if torch.is_grad_enabled():
            return self.own(z, return_dict)
        vae = self.vae
        decoder = vae.decoder if self.compiled is None or isinstance(z, FakeTensor) else self.compiled
        vae.clear_cache()
        parts = []
        with torch._dynamo.config.patch(recompile_limit=VARIANTS), _cudnn_benchmark(self.timed):
            for chunk in self._chunks(vae.post_quant_conv(z)):
                parts.append(decoder(chunk, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=not parts))
        vae.clear_cache()
        videos = torch.cat(parts, 2)
        if vae.config.patch_size is not None:
            videos = unpatchify(videos, vae.config.patch_size)
        videos = videos.clamp(-1, 1)
        return DecoderOutput(sample=videos) if return_dict else (videos,)

    def _chunks(self, latents: Tensor) -> list[Tensor]:
        first, others = latents[:, :, :1], latents[:, :, 1:]
        return [first, *(others.split(self.frames, 2) if others.shape[2] else ())]


@contextlib.contextmanager
def _cudnn_benchmark(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def decode_in_chunks(vae: nn.Module | None, frames: int | None, compiled: bool, timed: bool) -> bool:
    """Make a VAE decode `frames` latent frames at a time, None: as before; return whether it supports that."""
    before = None if vae is None else vars(vae).pop("_decode", None)
    if isinstance(before, ChunkedDecoder) and before.timed:
        for weight in vae.decoder.parameters():
            weight.data = weight.data.contiguous()
    if frames is None:
        return True
    if type(vae).__name__ not in CAUSAL_CHUNKS:
        return False
    vae._decode = ChunkedDecoder(vae, frames, compiled, timed)
    return True
