"""Write runs as one HTML file with JSON data, style and script inline; user text cannot escape the data."""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from ..run_files import add_listed
from ..whole_files import atomically
from .read_run import PAGE_FILE, read_run

MARK = '<meta name="generator" content="pisces-rl report">'


def page(runs: Sequence[dict]) -> str:
    """Return the HTML page of runs.

    The data is ASCII JSON with <, > and & as \\uXXXX, so no text in it can end its element. The script inserts text
    only by textContent, and the page's content security policy allows no other script.

    Args:
        runs: as `read_run` returns them, each with "base", the address of its folder (relative or "", or None for no
            links), and "embedded", {path: data URI}.
    """
    parts = files(__package__)
    template, style, script = (
        parts.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    script = parts.joinpath("charts.js").read_text(encoding="utf-8") + script
    data = json.dumps({"runs": list(runs)}, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    hashes = {
        name: "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("script", script), ("style", style))
    }
    parts = {
        "MARK": MARK,
        "SCRIPT_HASH": hashes["script"],
        "STYLE_HASH": hashes["style"],
        "STYLE": style,
        "DATA": data,
        "SCRIPT": script,
    }
    pieces = template.split("%%")  # one pass: inserted text is not searched for markers
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def write_page(
    folders: Sequence[str | os.PathLike], output: str | os.PathLike | None = None, one_file: bool = False
) -> Path:
    """Write the page of one run, or of several side by side, atomically.

    Args:
        folders: the output_dir of each run.
        output: the file to write; None: report.html in the folder of a single run.
        one_file: True embeds the videos of the first and last evaluation, so that the file can be shared alone; False
            links videos and files by relative paths.

    Returns:
        The file's path.

    Raises:
        ValueError: a folder holds no run; output is None for several runs, or exists and is not a run's page.
    """
    if output is None and len(folders) != 1:
        raise ValueError(f"output is not set for {len(folders)} runs; set it, for example output='comparison.html'.")
    output = Path(folders[0], PAGE_FILE) if output is None else Path(output)
    if output.is_dir():
        raise ValueError(f"output={str(output)!r} is a folder; give a file, such as {str(output / PAGE_FILE)!r}.")
    runs = [read_run(folder) for folder in folders]
    if output.exists() and MARK.encode() not in output.read_bytes()[:2_000]:
        raise ValueError(f"output={str(output)!r} exists and is not a run's page, so it is kept. Give another file.")
    for run, folder in zip(runs, folders):
        run["base"] = None if one_file else _address(folder, output)
        run["embedded"] = _embedded(run, Path(folder)) if one_file else {}
    text = page(runs).encode("utf-8")
    atomically(output, lambda file: file.write(text))
    for folder in folders:
        if output.resolve() == (Path(folder) / PAGE_FILE).resolve():
            add_listed(folder, [PAGE_FILE])
    return output


def _address(folder: str | os.PathLike, output: Path) -> str:
    """Return a folder's address relative to the page."""
    folder, parent = Path(folder).resolve(), output.resolve().parent
    try:
        path = Path(os.path.relpath(folder, parent)).as_posix()
    except ValueError:  # on another drive
        return folder.as_uri() + "/"
    return "" if path == "." else quote(path, errors="surrogateescape") + "/"


def _embedded(run: dict, folder: Path) -> dict[str, str]:
    found = {}
    for evaluation in [*run["evaluations"][:1], *run["evaluations"][-1:]]:
        for path in [path for part in evaluation["sets"].values() for path in part["videos"] or () if path]:
            found[path] = "data:video/mp4;base64," + base64.b64encode((folder / path).read_bytes()).decode()
    return found
