"""VBench (arXiv 2311.17982) and VBench-2.0 (arXiv 2503.21755) before and after training.

`export` samples the videos of a prompt suite under the file names that VBench's runner expects. The runner scores them
in a separate environment. `read` compares its result files. The command is `pisces-rl vbench`.
"""

import importlib

_HOME = {
    "VBENCH": "vbench_constants",
    "VBENCH2": "vbench_constants",
    "SuiteVideo": "vbench_suite",
    "compare_results": "vbench_scores",
    "export": "vbench_export",
    "read_results": "vbench_scores",
    "read_suite": "vbench_suite",
    "write_comparison": "vbench_report",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Load functions that need torch on first use."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
