"""`pisces-rl export`: convert a trained adapter for another program, or merge it into the base; see docs/export.md."""

import argparse

from . import usage_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pisces_rl.export import FAMILIES, FORMATS

    parser.add_argument("folder", help="The adapter: a run's output_dir, or a Hub id.")
    parser.add_argument("output", help="Folder to write to; may be the run's folder.")
    parser.add_argument("--format", default="diffusers", choices=[*FORMATS, "merged"])
    parser.add_argument(
        "--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="Number format of the files."
    )
    parser.add_argument(
        "--model",
        help=f"With --format merged: the base model, a folder or Hub id. Otherwise one of {', '.join(FAMILIES)}, "
        "needed if the adapter does not record its model.",
    )


def main(args: argparse.Namespace) -> None:
    from pisces_rl.export import DTYPES, export_adapter, merge_adapter
    from pisces_rl.trainers import load_pipeline

    if args.format != "merged":
        for path in export_adapter(args.folder, args.output, args.format, dtype=args.dtype, model=args.model):
            print(path)
        return
    if args.model is None:
        usage_error("--format merged needs --model, the base model.")
    pipeline = load_pipeline(args.model, DTYPES[args.dtype])
    for name, merged in merge_adapter(pipeline, args.folder, args.output).items():
        print(
            f"{args.output}/{name}: {merged.changed:,} of {merged.weights:,} weights of {merged.modules} "
            "modules changed"
        )
