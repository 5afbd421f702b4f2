"""Datasets of preferences: rows with `prompt`, `chosen` and `rejected`."""

import os

from datasets import Dataset
from torch import Tensor

from .video_data import as_video

SIDES = "chosen", "rejected"


def check_pairs(dataset: Dataset) -> None:
    """Raise a ValueError if a video of a pair is missing, or both are the same; files are not opened."""
    for name in SIDES:
        if name not in dataset.column_names:
            raise ValueError(
                f"train_dataset has columns {dataset.column_names} but none named `{name}`: a pair needs "
                "`chosen` and `rejected`."
            )
    if dataset.format["type"] is not None:  # a transform produces its rows only when they are drawn
        return
    for row, pair in enumerate(dataset.select_columns(["prompt", *SIDES])):
        of = f"train_dataset row {row} ({pair['prompt']!r})"
        sides = [_source(pair[name]) for name in SIDES]
        for name, side in zip(SIDES, sides):
            if side is None:
                raise ValueError(f"{of}: `{name}` is missing; add it, or remove the row.")
            if isinstance(side, str) and not os.path.isfile(side):
                raise ValueError(f"{of}: `{name}` is {side!r}, which is not a file.")
        if sides[0] == sides[1]:
            raise ValueError(
                f"{of}: `chosen` and `rejected` are the same video, so neither is preferred; remove the row."
            )


def _source(given):
    """Return what identifies a video: its path, the bytes of its file, or its values; None if there is none."""
    if isinstance(given, dict):
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    return None if given == "" else given


def pair_of(row: dict, frames: int) -> list[Tensor]:
    """Return the chosen and the rejected video of a row, (F, 3, H, W) each.

    Raises:
        ValueError: a video cannot be read, or both are equal. The message names the prompt.
    """
    videos = []
    for name in SIDES:
        try:
            videos.append(as_video(row[name], frames))
        except (ValueError, OSError) as error:
            raise ValueError(f"train_dataset, prompt {row['prompt']!r}: `{name}`: {error}") from error
    if videos[0].shape == videos[1].shape and bool((videos[0] == videos[1]).all()):
        raise ValueError(f"train_dataset, prompt {row['prompt']!r}: `chosen` and `rejected` are the same video.")
    return videos
