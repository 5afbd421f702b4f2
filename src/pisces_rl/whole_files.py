"""Atomic file writes: a file appears whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def atomically(path: str | Path, write: Callable) -> Path:
    """Write to a temporary file next to `path`, then move it to `path`; a failure leaves nothing behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, content, indent: int | None = None) -> Path:
    """Write content as JSON, in UTF-8."""
    text = json.dumps(content, indent=indent) + "\n"
    return atomically(path, lambda file: file.write(text.encode("utf-8")))
