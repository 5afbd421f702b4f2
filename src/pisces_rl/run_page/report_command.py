"""`pisces-rl report A [B ...]`: the page of a run, or of several side by side."""

import argparse
from pathlib import Path

from .html_page import write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="Each a run's output_dir, finished or not.")
    parser.add_argument(
        "--output",
        type=Path,
        help="File to write; unset: report.html in the run's folder, of "
        "several runs comparison.html in the current one.",
    )
    parser.add_argument(
        "--one_file",
        action="store_true",
        help="Put the videos of the first and last evaluation into the file, to send it alone.",
    )


def main(args: argparse.Namespace) -> None:
    output = args.output or (Path("comparison.html") if len(args.runs) > 1 else None)
    path = write_page(args.runs, output, args.one_file)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
