"""A saved adapter for other programs: other layouts and names of the same LoRA, or the base with it merged in."""

from .adapter_export import DTYPES, FORMATS, export_adapter
from .merging import Merged, merge_adapter
from .original_names import FAMILIES, Family

__all__ = ["DTYPES", "FAMILIES", "FORMATS", "Family", "Merged", "export_adapter", "merge_adapter"]
