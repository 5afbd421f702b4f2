"""`pisces-rl vbench export|read`: VBench before and after training; its runner needs a separate environment."""

import argparse
from pathlib import Path

from ..sampling_arguments import add_sampling_arguments, sampling_call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="vbench_command", metavar="{export,read}", required=True)
    style = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    own = commands.add_parser("export", help="sample the videos of a prompt suite", **style)
    own.set_defaults(run=run_export)
    add_sampling_arguments(own)
    own.add_argument("--suite", required=True, type=Path, help="VBench_full_info.json or VBench2_full_info.json.")
    own.add_argument("--output_dir", required=True, type=Path, help="The videos go to its subfolder videos/.")
    own.add_argument("--dimensions", nargs="+", help="Dimensions of the suite; unset: all.")

    own = commands.add_parser("read", help="compare the result files of VBench's runner", **style)
    own.set_defaults(run=run_read)
    for name in ("before", "after"):
        own.add_argument(
            f"--{name}", required=True, type=Path, help="Folder with *_eval_results.json, or one such file."
        )
    own.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        help="Folder for the report; give the run's folder to add it to the run's report.",
    )


def run_export(args: argparse.Namespace) -> None:
    from .vbench_export import export
    from .vbench_suite import VIDEOS

    count = export(
        args.model,
        args.suite,
        args.output_dir,
        adapter=args.adapter,
        dimensions=args.dimensions,
        seed=args.seed,
        batch_size=args.batch_size,
        fps=args.fps,
        num_inference_steps=args.num_inference_steps,
        call=sampling_call(args),
        bf16=args.bf16,
    )
    print(f"sampled {count} videos; all are in {args.output_dir / VIDEOS}", flush=True)


def run_read(args: argparse.Namespace) -> None:
    from .vbench_report import markdown_results, write_comparison
    from .vbench_scores import compare_results

    comparison = compare_results(args.before, args.after)
    written = write_comparison(comparison, args.output_dir)
    print(markdown_results(comparison))
    print("wrote", *written)


def main(args: argparse.Namespace) -> None:
    args.run(args)
