"""`pisces-rl report A [B ...]`: write the page of one run, or of several side by side."""

import argparse
from pathlib import Path

from .html_page import write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="The output_dir of each run, finished or not.")
    parser.add_argument(
        "--output",
        type=Path,
        help="File to write; unset: report.html in the run's folder, or, for several runs, comparison.html in the "
        "current folder.",
    )
    parser.add_argument(
        "--one_file",
        action="store_true",
        help="Embed the videos of the first and last evaluation, so that the file can be shared alone.",
    )


def main(args: argparse.Namespace) -> None:
    output = args.output or (Path("comparison.html") if len(args.runs) > 1 else None)
    path = write_page(args.runs, output, args.one_file)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
