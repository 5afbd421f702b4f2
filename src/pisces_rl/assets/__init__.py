"""Models shipped with the package, found by name."""

import difflib
import json
from importlib import resources
from pathlib import Path


def available(card: str = "model_index.json") -> list[str]:
    """Return the names of embedded models whose folder has a file `card`: for encoders, pass "config.json"."""
    root = resources.files(__name__)
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.joinpath(card).is_file())


def asset_path(name: str, card: str = "model_index.json") -> Path:
    """Return the folder of an embedded model, for instance `asset_path("tiny-wan")`.

    Args:
        name: the model's name.
        card: as for `available`.

    Raises:
        ValueError: no embedded model has that name; the message suggests the nearest one.
    """
    if name not in available(card):
        nearest = difflib.get_close_matches(name, available(card), n=1, cutoff=0)
        raise ValueError(
            f"{name!r} is not an embedded model; did you mean {nearest[0] if nearest else None!r}? "
            f"Available: {available(card)}."
        )
    return Path(str(resources.files(__name__).joinpath(name)))


def call_defaults(model: str) -> dict:
    """Return the default call arguments of an embedded model: size, frames, steps, guidance.

    Args:
        model: a name, a Hub id or a folder. Only embedded models have defaults (`call.json`); for any other model the
            result is empty.
    """
    folder = asset_path(model) if model in available() else Path(model)
    if folder.parent != Path(str(resources.files(__name__))) or not (folder / "call.json").is_file():
        return {}
    return json.loads((folder / "call.json").read_text(encoding="utf-8"))
