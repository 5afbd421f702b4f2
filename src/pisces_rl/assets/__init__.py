"""Models shipped with the package, found by name."""

import difflib
from importlib import resources
from pathlib import Path


def available() -> list[str]:
    """Names of the embedded models."""
    root = resources.files(__name__)
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("_"))


def asset_path(name: str) -> Path:
    """The folder of an embedded model, for instance `asset_path("tiny-wan")`.

    Raises:
        ValueError: no embedded model has that name; the nearest one is named.
    """
    if name not in available():
        nearest = difflib.get_close_matches(name, available(), n=1, cutoff=0)
        raise ValueError(f"{name!r} is not an embedded model; did you mean {nearest[0] if nearest else None!r}? "
                         f"Available: {available()}.")
    return Path(str(resources.files(__name__).joinpath(name)))
