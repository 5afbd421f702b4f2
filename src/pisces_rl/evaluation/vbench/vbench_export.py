"""Sample the videos of a VBench suite into the files that its runner expects; resumable, on one or more processes."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from tqdm import tqdm

from pisces_rl.media.encoding import check_mp4, mp4_bytes
from pisces_rl.whole_files import write_json

from ..sampling_policy import add_trained, sampling_policy
from .vbench_suite import VIDEOS, SuiteVideo, read_suite

SETTINGS = "export.json"
_UNFINISHED = "unfinished"  # outside videos/: the runner would score a temporary file


def export(
    model: str | DiffusionPipeline,
    suite: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dimensions: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    fps: float = 8,
    num_inference_steps: int | None = None,
    call: dict | None = None,
    bf16: bool | None = None,
) -> int:
    """Write the suite's missing videos to `output_dir/videos`; `read_suite` explains their names.

    Each process of `accelerate launch` samples a share of the missing videos. Each video's start noise has a separate
    seed, so the base model and a trained one start from the same noise if exported with the same `seed`. Files are
    written atomically; an incomplete file from another program is sampled again. `output_dir/export.json` holds the
    settings and each file's seed.

    Args:
        model: a pipeline without an adapter, or a name that `load_pipeline` accepts.
        suite: path of VBench's or VBench-2.0's JSON file.
        output_dir: the folder to write to.
        adapter: folder of a run, a saved LoRA or trained components, or a LoRA's file or Hub id; None: the base model.
        dimensions: dimensions of the suite; None: all.
        seed: seed of all noise.
        batch_size: videos per call of the pipeline.
        fps: frames per second of the files.
        num_inference_steps: denoising steps; None uses the training default.
        call: other arguments of the pipeline's call; those that are unset default to those of training.
        bf16: True for weights and autocast in bfloat16, False for fp32; None: bfloat16 on a GPU only.

    Returns:
        The number of videos that this process sampled.

    Raises:
        ValueError: see `read_suite`; or the folder holds videos with other settings, or the model or adapter does not
            exist.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    check_mp4(fps)
    benchmark, videos = read_suite(suite, dimensions, seed)
    state, folder = PartialState(cpu=not torch.accelerator.is_available()), Path(output_dir)
    bf16 = state.device.type == "cuda" if bf16 is None else bf16
    policy, made = sampling_policy(model, num_inference_steps=num_inference_steps, call=call, bf16=bf16)
    digest = None if adapter is None else add_trained(policy, adapter)
    policy.place(state.device)
    settings = {
        "benchmark": benchmark.name,
        "model": made.pop("model"),
        "adapter": digest,
        "seed": seed,
        "fps": fps,
        **made,
    }
    plan = [None, None]
    if state.is_main_process:  # only one process lists the files, so that all agree on what is missing
        try:
            _keep_settings(folder / SETTINGS, settings, videos)
            plan = [None, [video for video in videos if not all(is_whole_mp4(folder / path) for path in video.paths)]]
        except (OSError, ValueError) as error:  # raised on all processes below: they wait for the plan
            plan = [error, None]
    error, missing = broadcast_object_list(plan)
    if error is not None:
        raise error
    own = missing[state.process_index :: state.num_processes]
    for start in tqdm(range(0, len(own), batch_size), unit="batch", disable=None if state.is_main_process else True):
        part = own[start : start + batch_size]
        clips = policy.sample([video.prompt for video in part], noise_seeds=[video.seed for video in part]).videos
        for video, clip in zip(part, clips):
            data = mp4_bytes(clip.cpu(), fps, min_size=0)
            for path in video.paths:
                _write(folder, path, data, state.process_index)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
    return len(own)


def is_whole_mp4(path: Path) -> bool:
    """Return whether a file's boxes (ISO/IEC 14496-12, 4.2) end at the file's end and include the index and the
    frames; a truncated copy fails this check."""
    kinds, size = set(), path.stat().st_size if path.is_file() else 0
    with path.open("rb") if size else contextlib.nullcontext() as file:
        at = 0
        while at + 8 <= size:
            file.seek(at)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            length = int.from_bytes(header[8:16], "big") if length == 1 else length
            if length < 8:
                return False
            kinds.add(header[4:8])
            at += length
    return at == size and {b"moov", b"mdat"} <= kinds if size else False


def _write(folder: Path, path: str, data: bytes, process: int) -> None:
    unfinished, final = folder / _UNFINISHED / f"{process}.mp4", folder / path
    for place in (unfinished.parent, final.parent):
        place.mkdir(parents=True, exist_ok=True)
    unfinished.write_bytes(data)
    os.replace(unfinished, final)


def _keep_settings(path: Path, settings: dict, videos: Sequence[SuiteVideo]) -> None:
    """Write the settings; raise a ValueError if the folder's videos were made with others."""
    settings = json.loads(json.dumps(settings, default=str))
    seeds = {file: video.seed for video in videos for file in video.paths}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            seeds = before.pop("seeds") | seeds
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} was not written by an export ({error}); give an empty output_dir.") from error
        other = [
            f"{key}={before.get(key)!r}, now {settings.get(key)!r}"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        ]
        if other:
            raise ValueError(
                f"output_dir={str(path.parent)!r} holds videos with other settings: {'; '.join(other)}. "
                "Give another output_dir, or remove that folder."
            )
    elif (path.parent / VIDEOS).exists():
        raise ValueError(
            f"output_dir={str(path.parent)!r} holds videos, but no {path.name} with their settings. "
            "Give another output_dir."
        )
    write_json(path, settings | {"seeds": seeds}, indent=0)
