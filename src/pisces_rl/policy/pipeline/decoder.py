"""How a pipeline's VAE decodes: its dtype, slices and tiles; and where a run of the pipeline does it."""

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
) -> None:
    """Set what a pipeline's VAE computes in, and in how many parts.

    Args:
        dtype: name in `VAE_DTYPES`; None leaves it as it was loaded.
        slicing: one video at a time, for memory.
        tiling: parts of a frame at a time, blended where they overlap: for frames above the VAE's tile size the videos
            change a little.
        chunk_frames: latent frames at a time of a causal VAE (Wan's), for speed and more memory, without gradients.
        compiled: with chunk_frames, compiled: the first videos of each batch size wait for it.

    Raises:
        PolicyError: there is no VAE, it cannot do so, or a dtype of another name.
    """
    if dtype not in (None, *VAE_DTYPES):
        raise PolicyError(f"vae_dtype={dtype!r} must be one of {list(VAE_DTYPES)}, or unset: as it was loaded.")
    wanted = [
        name
        for name, value in (
            ("dtype", dtype),
            ("slicing", slicing),
            ("tiling", tiling),
            ("chunk_frames", chunk_frames),
            ("compile", compiled),
        )
        if value
    ]
    vae = getattr(pipeline, "vae", None)
    if wanted and vae is None:
        name = type(pipeline).__name__
        raise PolicyError(f"vae_{wanted[0]} is set, but {name} has no component vae; leave it unset.")
    if dtype is not None:
        vae.to(VAE_DTYPES[dtype])
    if (tiling or chunk_frames is None) and compiled or (tiling and chunk_frames is not None):
        raise PolicyError("vae_compile needs vae_chunk_frames, and neither goes with vae_tiling.")
    if chunk_frames is not None and chunk_frames < 1:
        raise PolicyError(f"vae_chunk_frames={chunk_frames} must be at least 1 latent frame.")
    if not decode_in_chunks(vae, chunk_frames, compiled):
        raise PolicyError(
            f"vae_chunk_frames={chunk_frames}, but {type(vae).__name__} of {type(pipeline).__name__} cannot do so, "
            f"only {', '.join(CAUSAL_CHUNKS)}; leave it unset."
        )
    for name, value in (("slicing", slicing), ("tiling", tiling)):
        if value and not _enabled(vae, name):
            raise PolicyError(
                f"vae_{name}=True, but {type(vae).__name__} of {type(pipeline).__name__} cannot do so; leave it False"
                ", and lower rollout_batch_size (and per_device_eval_batch_size) to save memory."
            )


def _enabled(vae: nn.Module, name: str) -> bool:
    """Switches "slicing" or "tiling" on; False where the VAE cannot do so."""
    if name == "slicing" and type(vae).__name__ in WITHOUT_SLICES:
        return False
    if not (hasattr(vae, f"enable_{name}") and hasattr(vae, f"use_{name}")):  # by the second diffusers itself tells
        return False
    getattr(vae, f"enable_{name}")()
    return True


@contextlib.contextmanager
def recorded_decoding(pipeline: DiffusionPipeline, record: Callable, dtype: str | None = None) -> Iterator[None]:
    """Inside, the VAE decodes within record("decode"), and takes what it decodes and encodes in `dtype`: not every
    pipeline converts it."""
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
