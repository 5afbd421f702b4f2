"""Estimate a run's memory before it starts, on fake tensors, without weights or a GPU."""

from .memory import Held, MemoryEstimate, estimate_memory
from .weightless import weightless_pipeline

__all__ = ["Held", "MemoryEstimate", "estimate_memory", "weightless_pipeline"]
