"""The images of image-to-video: columns of a data set as arguments of the pipeline's call."""

import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence

from datasets import Dataset, Value
from diffusers import DiffusionPipeline

from .... import media


def image_columns(pipeline: DiffusionPipeline, chosen: Sequence[str] | None) -> list[str]:
    """The data set's columns of images; unset: `image` where the pipeline's call has such an argument.

    Raises:
        ValueError: the pipeline's call has no argument of that name.
    """
    known = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    if chosen is None:
        return ["image"] if "image" in known else []
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"image_columns={list(chosen)}: {type(pipeline).__name__} takes no argument {name!r}; a column is "
                f"named as the argument that its images are for, of {sorted(set(known) - {'self'})}."
            )
    return list(chosen)


def check_images(name: str, dataset, columns: Sequence[str]) -> None:
    """A ValueError where a data set (or one of a dict of them) lacks a column of images or a row's image.

    Files are looked for, the first image is opened; others are opened when they are needed.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_images(f"{name}[{key!r}]", part, columns)
        return
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has columns {dataset.column_names} but none named {column!r}, which the pipeline takes its "
                "images from; add it (pictures, paths or tensors), or name the columns in image_columns ([] for none)."
            )
        for row in _empty_rows(dataset, column):
            raise ValueError(f"{name} row {row}: {column} is None; every row needs an image.")
        if dataset.features[column] == Value("string"):
            for row, path in enumerate(dataset[column]):
                if not os.path.isfile(path):
                    raise ValueError(f"{name} row {row}: {column} is {path!r}, and there is no such file.")
        _loaded(f"{name} row 0: {column}", dataset[0][column])


def _empty_rows(dataset: Dataset, column: str):
    """Rows without a value; nothing is read where the table has none."""
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
    """{column: PIL images} of a batch of rows {column: values}: `conditions` of a `VideoPolicy`."""
    prompts = rows["prompt"]
    for column in columns:
        if column not in rows:
            raise ValueError(f"the data set has columns {sorted(rows)} but none named {column!r} with an image.")
    return {
        column: [_loaded(f"{column} of prompt {prompts[i]!r}", value) for i, value in enumerate(rows[column])]
        for column in columns
    }


def group_keys(prompts: Sequence[str], images: Mapping[str, Sequence]) -> list[str]:
    """What a group has in common, in words: the prompt, and the digests of its images where it has some."""
    keys = list(prompts)
    for name, pictures in images.items():
        digests = [hashlib.sha256(repr(p.size).encode() + p.tobytes()).hexdigest()[:16] for p in pictures]
        keys = [f"{key} [{name} {digest}]" for key, digest in zip(keys, digests)]
    return keys
