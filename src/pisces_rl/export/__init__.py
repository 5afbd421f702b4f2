"""Export a saved adapter for other programs: the same LoRA in other layouts, or merged into the base model."""

import importlib
from typing import TYPE_CHECKING

from .original_names import FAMILIES, FORMATS, Family

_HOME = {
    "DTYPES": "adapter_export",
    "Merged": "merging",
    "export_adapter": "adapter_export",
    "merge_adapter": "merging",
}
__all__ = ["FAMILIES", "FORMATS", "Family", *_HOME]

if TYPE_CHECKING:  # for type checkers, which do not see `__getattr__`
    from .adapter_export import DTYPES as DTYPES
    from .adapter_export import export_adapter as export_adapter
    from .merging import Merged as Merged
    from .merging import merge_adapter as merge_adapter


def __getattr__(name: str) -> object:
    """Load what needs torch on first use: `pisces-rl export --help` imports this package."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
