"""Write a comparison of VBench results to files, and to a run's report and model card."""

import os
import re
from pathlib import Path

from pisces_rl.run_files import OTHER_CARD, README, add_listed, described
from pisces_rl.whole_files import atomically, write_json

from .vbench_constants import VBENCH, VBENCH2

_PLACES = ("\n## Samples\n", "\n## Training\n")  # headings in the card; the section goes before the first


def markdown_results(comparison: dict) -> str:
    """Return the comparison of `compare_results` as a Markdown table, totals first."""
    lines = ["| score | before | after | prompts | paired difference (95 %) |", "|---|---|---|---|---|"]
    for name, row in [*comparison["totals"].items(), *comparison["dimensions"].items()]:
        difference = (
            "" if row["difference"] is None else (f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]")
        )
        label = name.replace("_", " ")
        label = f"**{label}**" if name in comparison["totals"] else label
        lines.append(f"| {label} | {row['before']:.4f} | {row['after']:.4f} | {row['n']} | {difference} |")
    lines += [
        "",
        f"{comparison['benchmark']}; before and after are the runner's means; totals use its normalization "
        "and weights; differences are over the prompts in both; intervals are bootstrapped over prompts.",
    ]
    if comparison["left_out"]:
        lacking = "; ".join(f"{name} lacks {', '.join(own)}" for name, own in comparison["left_out"].items())
        lines += ["", f"Left out: {lacking}.".replace("_", " ")]
    return "\n".join(lines) + "\n"


def write_comparison(comparison: dict, output_dir: str | os.PathLike) -> list[Path]:
    """Write `vbench/report.json` and `vbench/report.md` (or `vbench2/...`) to a folder.

    If the folder is a run's, list them among its files and add the table as a section to the run's report.md and
    model card; it replaces an earlier one.

    Returns:
        The files that were written or changed.
    """
    folder = Path(output_dir)
    benchmark = next(b for b in (VBENCH, VBENCH2) if b.name == comparison["benchmark"])
    table, own = markdown_results(comparison), folder / benchmark.folder
    written = [write_json(own / "report.json", comparison, indent=1), _write(own / "report.md", table)]
    files = described(folder)
    if files is not None:
        add_listed(folder, [path.relative_to(folder).as_posix() for path in written])
        for name in ("report.md", README, OTHER_CARD):
            if name in files:
                text = (folder / name).read_text(encoding="utf-8")
                written.append(_write(folder / name, _with_section(text, benchmark.name, table)))
    return written


def _with_section(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n## {name}\n\n{table}\n{end}\n"
    before, found, rest = text.partition(begin)
    if found and end in rest:
        return before + section + rest.partition(end)[2].removeprefix("\n")
    at = min(
        (match.start() + 1 for place in _PLACES for match in [re.search(re.escape(place), text)] if match),
        default=len(text),
    )
    gap = "" if text[:at].endswith("\n\n") else "\n" if text[:at].endswith("\n") else "\n\n"
    return text[:at] + gap + section + ("\n" if text[at:] else "") + text[at:]


def _write(path: Path, text: str) -> Path:
    return atomically(path, lambda file: file.write(text.encode("utf-8")))
