"""Preferences as a data set: rows with `prompt`, `chosen` and `rejected`."""

from datasets import Dataset
from torch import Tensor

from .video_data import as_video

SIDES = "chosen", "rejected"


def check_pairs(dataset: Dataset) -> None:
    """A ValueError where a side of a pair is missing, or both are the same file."""
    for name in SIDES:
        if name not in dataset.column_names:
            raise ValueError(f"train_dataset has columns {dataset.column_names} but none named `{name}`: a pair needs "
                             "`chosen` and `rejected`.")
    rows = dataset.with_format(None)
    prompts = rows["prompt"] if "prompt" in dataset.column_names else [None] * len(dataset)
    for row, (prompt, *given) in enumerate(zip(prompts, *(rows[name] for name in SIDES))):
        sides = [_source(side) for side in given]
        for name, side in zip(SIDES, sides):
            if side is None:
                raise ValueError(f"train_dataset row {row} ({prompt!r}): `{name}` is missing.")
        if sides[0] == sides[1]:
            raise ValueError(f"train_dataset row {row} ({prompt!r}): `chosen` and `rejected` are the same video.")


def _source(side) -> str | bytes | None:
    """Where a video is from, as far as that can be compared without reading it."""
    if isinstance(side, dict):
        side = side.get("path") if side.get("bytes") is None else side["bytes"]
    return side if side is None or isinstance(side, (str, bytes)) else repr(id(side))


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
