"""Write the trained weights atomically, check them by reading them back, and write the model card."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from safetensors import SafetensorError

from .... import hub
from ....policy import FullWeights, TrainedLoRA, VideoPolicy, has_guider
from ....run_files import RunFiles
from ....transitions import Paper


def write_adapter(pipeline: DiffusionPipeline, trained: TrainedLoRA | FullWeights, files: RunFiles) -> None:
    """Write the trained weights to a staging folder, then move them, so that a full disk keeps an earlier adapter."""
    folder = files.folder
    staging = folder / ".incomplete-adapter"
    try:
        paths = trained.save(pipeline, staging)
        files.claim_adapter(path.relative_to(staging).as_posix() for path in paths)
        for path in paths:
            final = folder / path.relative_to(staging)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the {' and '.join(trained.components) or 'adapter'} could not be written to {folder} ({error}). The "
            "previous files there and the checkpoints are intact; free some disk space and call save_model again, "
            "or resume."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_adapter(
    policy: VideoPolicy,
    trained: TrainedLoRA | FullWeights,
    written: DiffusionPipeline,
    folder: Path,
    images: dict[str, Image],
    bf16: bool,
    alone: bool,
) -> str:
    """Reload the written weights and compare them; return the result in words.

    Args:
        policy: the policy that was trained.
        trained: its trained weights.
        written: the pipeline whose weights were written, from `trained.gathered`.
        folder: the folder with the files.
        images: one image for each argument of the pipeline's call that conditions it.
        bf16: whether the pipeline runs in bf16.
        alone: whether one process can run the pipeline. If not, or if a LoRA's base is stored in 8 bits, compare
            weights instead of outputs.
    """
    stored = {parameter.dtype for module in policy.denoiser.values() for parameter in module.parameters()}
    cannot_add = any(dtype.itemsize == 1 for dtype in stored)  # fp8 storage (enable_layerwise_casting)
    if not alone or (cannot_add and not trained.components):
        trained.check_read_back(written, folder)
        return "read back, equal to the trained one"
    call = {"prompt": ["a video"], "num_inference_steps": 2} | policy.pipeline_kwargs | images
    dtypes = {next(module.parameters()).dtype for module in policy.denoiser.values()}
    half = bf16 or not dtypes <= {torch.float32, torch.float64}
    difference = trained.check_saved(written, folder, call, 5e-2 if half else 1e-4)
    return f"reloaded in a fresh pipeline, relative difference {difference:.1e}"


def write_card(
    files: RunFiles,
    policy: VideoPolicy,
    trained: TrainedLoRA | FullWeights,
    args,
    *,
    base_model: str,
    trainer: str,
    settings: dict,
    comparison: dict | None,
    samples_of: int,
    images: Sequence[str],
    papers: Sequence[Paper],
) -> Path:
    """Write the model card to the folder of `files`: README.md, or model_card.md if the user has a README.md there.

    Args:
        files: files of the folder.
        policy: the policy that was trained.
        trained: its trained weights.
        args: the run's config.
        samples_of: the step whose samples are shown.
        images: dataset columns that condition the pipeline.

    The other arguments are those of `hub.model_card`. Returns the path of the card.
    """
    samples = f"samples/step_{samples_of:06d}/"
    described = [p for p in files.current() if p.startswith(samples) or not p.startswith("samples/step")]
    call = {"num_inference_steps": args.num_inference_steps} | policy.pipeline_kwargs
    guider_scale = call.pop("guidance_scale", None) if has_guider(policy.pipeline) else None
    card = hub.model_card(
        base_model=str(base_model),
        trainer=trainer,
        pipeline_class=type(policy.pipeline).__name__,
        settings=settings,
        comparison=comparison,
        folder=files.folder,
        files=described,
        call=call,
        guider_scale=guider_scale,
        images=images,
        still=policy.makes_images,
        fps=args.fps,
        vae_tiling=args.vae_tiling,
        papers=papers,
        repo_id=args.hub_model_id if "/" in (args.hub_model_id or "") else None,
        dtype=str(trained.base_dtype(dict(policy.denoiser.items()))).removeprefix("torch."),
        components=trained.components,
    )
    path = files.claim_card()
    path.write_text(card, encoding="utf-8")
    return path
