"""Memory of a run before it is started: counted on fake tensors, without weights and without a GPU."""

from .memory import Held, MemoryEstimate, estimate_memory
from .weightless import weightless_pipeline

__all__ = ["Held", "MemoryEstimate", "estimate_memory", "weightless_pipeline"]
