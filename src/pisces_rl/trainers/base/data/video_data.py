"""Captioned videos for consistency distillation: rows with `prompt` and `video`."""

import os
from collections.abc import Sized

import torch
from datasets import Dataset, Video
from torch import Tensor

from ....media import load_video

FORMS = "a path, the bytes of a file, {'path', 'bytes'} of datasets.Video(decode=False), or a tensor (F, 3, H, W)"


def undecoded(dataset):
    """Return a dataset (or dict of them) whose `datasets.Video` columns yield files, so torchcodec is not needed."""
    if isinstance(dataset, dict):
        return {name: undecoded(part) for name, part in dataset.items()}
    if isinstance(dataset, Dataset):
        for name, feature in dataset.features.items():
            if isinstance(feature, Video):
                dataset = dataset.cast_column(name, Video(decode=False))
    return dataset


def check_videos(dataset) -> None:
    """Raise a ValueError if a `video_dataset` lacks something; if it is not a `datasets.Dataset`, only read row 0."""
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"video_dataset is a {type(dataset).__name__}, which has no length, but rows are drawn at random; pass a "
            "datasets.Dataset that is not streamed, or an object with __len__ and __getitem__."
        )
    if not len(dataset):
        raise ValueError("video_dataset is empty; it needs at least one row with `prompt` and `video`.")
    if isinstance(dataset, Dataset):
        columns, prompts = dataset.column_names, dataset["prompt"][:] if "prompt" in dataset.column_names else []
    else:
        try:
            first = dict(dataset[0])
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"video_dataset is a {type(dataset).__name__} whose row 0 cannot be read as a dict with `prompt` and "
                f"`video` ({type(error).__name__}: {error})."
            ) from error
        columns, prompts = list(first), [first.get("prompt")]
    for name in ("prompt", "video"):
        if name not in columns:
            raise ValueError(f"video_dataset has columns {columns} but none named `{name}`; rename or add it.")
    for row, prompt in enumerate(prompts):
        check_prompt(row, prompt)


def check_prompt(row: int, prompt) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"video_dataset row {row}: prompt is {prompt!r}; every prompt must be a string.")


def video_of(row: int, sample: dict, frames: int) -> Tensor:
    """Return the video of a row as `as_video` does; errors name the row."""
    try:
        return as_video(sample["video"], frames)
    except ValueError as error:
        raise ValueError(f"video_dataset row {row}: {error}") from error


def as_video(given, frames: int | None = None) -> Tensor:
    """Return a video as (F, 3, H, W) fp32 in [0, 1].

    Args:
        given: a path, the bytes of a file, a dict with either, or a tensor: floats in [0, 1] or uint8.
        frames: of a file, keep at most this many frames, evenly spread in time; None: all. A tensor keeps its frames.

    Raises:
        ValueError: `given` is none of these, or has another shape or range.
    """
    if isinstance(given, dict):
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    if isinstance(given, (str, os.PathLike, bytes)):
        return load_video(given, frames)
    try:
        video = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"video: expected {FORMS}, got a {type(given).__name__} ({error}).") from error
    if video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise ValueError(f"video: expected {FORMS}, got a tensor {tuple(video.shape)}.")
    video = video.float() / 255 if video.dtype == torch.uint8 else video.float()
    low, high = video.min().item(), video.max().item()
    if not (0 <= low and high <= 1):  # written so that NaN fails too
        raise ValueError(
            f"video: values from {low:g} to {high:g}, but a tensor that is not uint8 must lie in [0, 1]; divide it by "
            "255 or clamp it."
        )
    return video
