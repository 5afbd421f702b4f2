"""Condition images of image-to-video: dataset columns as arguments of the pipeline's call."""

import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence

from datasets import Dataset, Value
from diffusers import DiffusionPipeline

from .... import media


def image_columns(pipeline: DiffusionPipeline, chosen: Sequence[str] | None) -> list[str]:
    """Return the image columns: `chosen`, or if None `image`, if the pipeline's call has that argument.

    Raises:
        ValueError: the pipeline's call has no argument of a chosen name.
    """
    known = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    if chosen is None:
        return ["image"] if "image" in known else []
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"image_columns={list(chosen)}: {type(pipeline).__name__} takes no argument {name!r}; name a column "
                f"after the argument that takes its images, one of {sorted(set(known) - {'self'})}."
            )
    return list(chosen)


def check_images(name: str, dataset, columns: Sequence[str]) -> None:
    """Raise a ValueError if a dataset (or one of a dict of them) lacks an image column, or a row its image.

    Checks that files exist and opens the first image. Other images are opened when they are needed.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_images(f"{name}[{key!r}]", part, columns)
        return
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has columns {dataset.column_names} but none named {column!r}, which the pipeline takes its "
                "images from; add it (PIL images, paths or tensors), or set image_columns to the names of the columns "
                "([] for none)."
            )
        for row in _empty_rows(dataset, column):
            raise ValueError(f"{name} row {row}: {column} is None; every row needs an image.")
        if dataset.features[column] == Value("string"):
            for row, path in enumerate(dataset[column]):
                if not os.path.isfile(path):
                    raise ValueError(f"{name} row {row}: {column} is {path!r}, which is not a file.")
        _loaded(f"{name} row 0: {column}", dataset[0][column])


def _empty_rows(dataset: Dataset, column: str):
    """Yield the rows without a value; the data is not read if the table counts none."""
    if not dataset.data.column(column).null_count:
        return
    values = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(dataset), 256):
        empty = values[start : start + 256][column].is_null().to_pylist()
        yield from (start + i for i, missing in enumerate(empty) if missing)


def _loaded(where: str, value):
    try:
        return media.load_image(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def images_of(rows: Mapping[str, Sequence], columns: Sequence[str]) -> dict[str, list]:
    """Load the images of a batch {column: values} as {column: PIL images}, the `conditions` of a `VideoPolicy`."""
    prompts = rows["prompt"]
    for column in columns:
        if column not in rows:
            raise ValueError(f"the dataset has columns {sorted(rows)} but none named {column!r} with an image.")
    return {
        column: [_loaded(f"{column} of prompt {prompts[i]!r}", value) for i, value in enumerate(rows[column])]
        for column in columns
    }


def group_keys(prompts: Sequence[str], images: Mapping[str, Sequence]) -> list[str]:
    """Return one text per row that is equal within a group: the prompt, and the digests of its images if any."""
    keys = list(prompts)
    for name, pictures in images.items():
        digests = [hashlib.sha256(repr(p.size).encode() + p.tobytes()).hexdigest()[:16] for p in pictures]
        keys = [f"{key} [{name} {digest}]" for key, digest in zip(keys, digests)]
    return keys
