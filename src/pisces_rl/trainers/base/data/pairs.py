"""Preferences as a data set: rows with `prompt`, `chosen` and `rejected`."""

import os

from datasets import Dataset
from torch import Tensor

from .video_data import as_video

SIDES = "chosen", "rejected"


def check_pairs(dataset: Dataset) -> None:
    """A ValueError where a side of a pair is missing, or both are the same video; files are not opened."""
    for name in SIDES:
        if name not in dataset.column_names:
            raise ValueError(
                f"train_dataset has columns {dataset.column_names} but none named `{name}`: a pair needs "
                "`chosen` and `rejected`."
            )
    if dataset.format["type"] is not None:  # a transform's rows are what it makes of them when they are drawn
        return
    for row, pair in enumerate(dataset.select_columns(["prompt", *SIDES])):
        of = f"train_dataset row {row} ({pair['prompt']!r})"
        sides = [_source(pair[name]) for name in SIDES]
        for name, side in zip(SIDES, sides):
            if side is None:
                raise ValueError(f"{of}: `{name}` is missing; give both videos, or leave the row out.")
            if isinstance(side, str) and not os.path.isfile(side):
                raise ValueError(f"{of}: `{name}` names no file: {side!r}.")
        if sides[0] == sides[1]:
            raise ValueError(
                f"{of}: `chosen` and `rejected` are the same video, so neither is preferred; leave the row out."
            )


def _source(given):
    """What names a video: its path, the bytes of its file, or its values; None where there is none."""
    if isinstance(given, dict):
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    return None if given == "" else given


def pair_of(row: dict, frames: int) -> list[Tensor]:
    """The two videos of a row, (F, 3, H, W) each; a ValueError that names the prompt where they cannot be a pair."""
    videos = []
    for name in SIDES:
        try:
            videos.append(as_video(row[name], frames))
        except (ValueError, OSError) as error:
            raise ValueError(f"train_dataset, prompt {row['prompt']!r}: `{name}`: {error}") from error
    if videos[0].shape == videos[1].shape and bool((videos[0] == videos[1]).all()):
        raise ValueError(f"train_dataset, prompt {row['prompt']!r}: `chosen` and `rejected` are the same video.")
    return videos
