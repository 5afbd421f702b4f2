"""Set how a pipeline's VAE decodes (dtype, slices, tiles), and record when it does."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..fast.chunked_decoder import decode_in_chunks
from ..schedule.scheduler import PolicyError
from ..sessions.session import replaced_method
from .quirks import CAUSAL_CHUNKS, WITHOUT_SLICES

VAE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def set_decoder(
    pipeline: DiffusionPipeline,
    *,
    dtype: str | None = None,
    slicing: bool = False,
    tiling: bool = False,
    chunk_frames: int | None = None,
    compiled: bool = False,
    cudnn_benchmark: bool = False,
) -> None:
    """Set the dtype of a pipeline's VAE and the parts in which it decodes.

    Args:
        pipeline: whose VAE to set.
        dtype: name in `VAE_DTYPES`; None leaves it as loaded.
        slicing: decode one video at a time, to save memory.
        tiling: decode each frame in tiles, blended where they overlap; this changes videos slightly if frames exceed
            the VAE's tile size.
        chunk_frames: latent frames per call of a causal VAE (Wan's): faster, but uses more memory; without gradients.
        compiled: with chunk_frames, compile the decoder; it compiles again at the first videos of each batch size.
        cudnn_benchmark: with chunk_frames, let cuDNN time its kernels while it decodes, see `ChunkedDecoder`.

    Raises:
        PolicyError: there is no VAE, it does not support a setting, settings conflict, or the dtype is unknown.
    """
    if dtype not in (None, *VAE_DTYPES):
        raise PolicyError(f"vae_dtype={dtype!r} must be one of {list(VAE_DTYPES)}, or unset to keep it as loaded.")
    wanted = [
        name
        for name, value in (
            ("dtype", dtype),
            ("slicing", slicing),
            ("tiling", tiling),
            ("chunk_frames", chunk_frames),
            ("compile", compiled),
            ("cudnn_benchmark", cudnn_benchmark),
        )
        if value
    ]
    vae = getattr(pipeline, "vae", None)
    if wanted and vae is None:
        name = type(pipeline).__name__
        raise PolicyError(f"vae_{wanted[0]} is set, but {name} has no vae component; leave it unset.")
    if dtype is not None:
        vae.to(VAE_DTYPES[dtype])
    if chunk_frames is None and (compiled or cudnn_benchmark):
        raise PolicyError(f"vae_{wanted[-1]} needs vae_chunk_frames, for instance 8.")
    if tiling and chunk_frames is not None:
        raise PolicyError("vae_chunk_frames does not work with vae_tiling; set one of them.")
    if chunk_frames is not None and chunk_frames < 1:
        raise PolicyError(f"vae_chunk_frames={chunk_frames} must be at least 1 latent frame.")
    if not decode_in_chunks(vae, chunk_frames, compiled, cudnn_benchmark):
        raise PolicyError(
            f"vae_chunk_frames={chunk_frames}, but {type(vae).__name__} of {type(pipeline).__name__} does not support "
            f"it, only {', '.join(CAUSAL_CHUNKS)}; leave it unset."
        )
    for name, value in (("slicing", slicing), ("tiling", tiling)):
        if value and not _enabled(vae, name):
            raise PolicyError(
                f"vae_{name}=True, but {type(vae).__name__} of {type(pipeline).__name__} does not support it; leave "
                "it False, and lower rollout_batch_size (and per_device_eval_batch_size) to save memory."
            )


def _enabled(vae: nn.Module, name: str) -> bool:
    """Enable "slicing" or "tiling"; return False if the VAE does not support it."""
    if name == "slicing" and type(vae).__name__ in WITHOUT_SLICES:
        return False
    if not (hasattr(vae, f"enable_{name}") and hasattr(vae, f"use_{name}")):  # diffusers' own check is the second
        return False
    getattr(vae, f"enable_{name}")()
    return True


@contextlib.contextmanager
def recorded_decoding(pipeline: DiffusionPipeline, record: Callable, dtype: str | None = None) -> Iterator[None]:
    """Make the VAE decode within record("decode"), and cast its inputs to `dtype`, since not every pipeline does."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return

    def converted(own: Callable, x: Tensor, *args, **kwargs):
        return own(x if dtype is None else x.to(VAE_DTYPES[dtype]), *args, **kwargs)

    def decode(own: Callable, *args, **kwargs):
        with record("decode"):
            return converted(own, *args, **kwargs)

    with contextlib.ExitStack() as replaced:
        replaced.enter_context(replaced_method(vae, "decode", decode))
        if dtype is not None:
            replaced.enter_context(replaced_method(vae, "encode", converted))
        yield
