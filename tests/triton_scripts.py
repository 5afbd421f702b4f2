"""Scripts that compare Triton kernels with plain torch: on a GPU, or by Triton's interpreter where only it is."""

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch


def check(script: str, folder: Path) -> None:
    """Run the script in a separate process with the device as its argument; it must end by printing "agree".

    What it imports must be importable without Triton, too, which only torch for CUDA installs.
    """
    script = textwrap.dedent(script)
    if importlib.util.find_spec("triton") is None:
        imports = [node for node in ast.walk(ast.parse(script)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec("\n".join(map(ast.unparse, imports)), {})
        pytest.skip("needs triton")
    path = folder / "agree.py"
    path.write_text(script)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, str(path), device], env=environment, capture_output=True, text=True, timeout=600
    )
    assert "agree" in done.stdout, done.stderr[-3000:]
