"""`pisces-rl vbench export|read`: what training did by VBench, whose runner lives in an environment of its own."""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="vbench_command", required=True)
    style = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    own = commands.add_parser("export", help="sample the videos of a prompt suite", **style)
    own.set_defaults(run=run_export)
    own.add_argument("--model", required=True, help="A Hub id, a folder with a pipeline, or an embedded model.")
    own.add_argument(
        "--adapter",
        help="Folder of a run, of a LoRA or of trained components, a LoRA's file or Hub id; unset: the base model.",
    )
    own.add_argument("--suite", required=True, type=Path, help="VBench_full_info.json or VBench2_full_info.json.")
    own.add_argument("--output_dir", required=True, type=Path, help="The videos go to its folder videos/.")
    own.add_argument("--dimensions", nargs="+", help="Of the suite; unset: all.")
    own.add_argument("--seed", type=int, default=0, help="Of all noise; the same for models that are compared.")
    own.add_argument("--batch_size", type=int, default=1, help="Videos a call of the pipeline, on each process.")
    own.add_argument("--fps", type=float, default=8, help="Frames per second of the files.")
    own.add_argument("--num_inference_steps", type=int, help="Denoising steps; unset: as in training.")
    own.add_argument("--guidance_scale", type=float, help="Unset: the pipeline's default.")
    for name in ("height", "width", "num_frames"):
        own.add_argument(f"--{name}", type=int, help="Unset: the pipeline's default.")
    own.add_argument("--pipeline_kwargs", type=_json_object, default={}, help="Other arguments of its call, as JSON.")
    own.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="Unset: on a GPU.")

    own = commands.add_parser("read", help="compare the result files of VBench's runner", **style)
    own.set_defaults(run=run_read)
    for name in ("before", "after"):
        own.add_argument(f"--{name}", required=True, type=Path, help="Folder of *_eval_results.json, or a file.")
    own.add_argument("--output_dir", required=True, type=Path, help="Of the report; that of the run to show it there.")


def _json_object(text: str) -> dict:
    value = json.loads(text)  # argparse reports a ValueError
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object such as '{\"max_sequence_length\": 512}'")
    return value


def run_export(args: argparse.Namespace) -> None:
    from .vbench_export import export
    from .vbench_suite import VIDEOS

    names = ("guidance_scale", "height", "width", "num_frames")
    call = args.pipeline_kwargs | {name: getattr(args, name) for name in names if getattr(args, name) is not None}
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
        call=call,
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
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f"pisces-rl vbench {args.vbench_command}: {error}")
