"""The trained adapter on disk: written whole, read back, compared."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from safetensors import SafetensorError

from ..policy import VideoPolicy, check_saved_lora, check_saved_weights, save_lora
from ..run_files import RunFiles


def write_adapter(pipeline: DiffusionPipeline, files: RunFiles) -> None:
    """Files appear whole or not at all: an earlier adapter in the folder is not lost to a full disk."""
    folder = files.folder
    staging = folder / ".incomplete-adapter"
    try:
        paths = save_lora(pipeline, staging)
        files.claim_adapter(path.relative_to(staging).as_posix() for path in paths)
        for path in paths:
            final = folder / path.relative_to(staging)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the adapter could not be written to {folder} ({error}). What was there before is whole, and so are "
            "the checkpoints; free some space and call save_model again, or resume."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_adapter(policy: VideoPolicy, folder: Path, images: dict[str, Image], bf16: bool, alone: bool) -> str:
    """Reload what was written, compare, and say in words how.

    Args:
        images: one for each argument of the pipeline's call that conditions it. bf16: whether it runs in bf16.
        alone: whether one process can run the pipeline. Where it cannot, or the base is stored in 8 bits, weights are
            compared instead of outputs.
    """
    stored = {parameter.dtype for module in policy.denoiser.values() for parameter in module.parameters()}
    if not alone or any(dtype.itemsize == 1 for dtype in stored):  # fp8 storage (enable_layerwise_casting) cannot add
        check_saved_weights(policy.pipeline, folder)
        return "read back, equal to the trained one"
    call = {"prompt": ["a video"], "num_inference_steps": 2} | policy.pipeline_kwargs | images
    dtypes = {next(module.parameters()).dtype for module in policy.denoiser.values()}
    half = bf16 or not dtypes <= {torch.float32, torch.float64}
    difference = check_saved_lora(policy.pipeline, folder, call, 5e-2 if half else 1e-4)
    return f"reloaded in a fresh pipeline, relative difference {difference:.1e}"
