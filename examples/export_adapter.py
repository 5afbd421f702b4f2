r"""A trained adapter for another program: other layouts of the same LoRA, or the base with it merged in.

    python examples/export_adapter.py outputs/run outputs/run --format comfyui
    python examples/export_adapter.py outputs/run exported --format peft --dtype fp32
    python examples/export_adapter.py outputs/run merged --format merged --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

Which file is for what: docs/export.md.
"""

import argparse

from pisces_rl import export_adapter, merge_adapter
from pisces_rl.export import DTYPES, FAMILIES, FORMATS
from pisces_rl.trainers import load_pipeline


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Of the adapter: a run's output_dir, or a Hub id.")
    parser.add_argument("output", help="Folder to write to; it may be the run's.")
    parser.add_argument("--format", default="diffusers", choices=[*FORMATS, "merged"])
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="Of the files.")
    parser.add_argument(
        "--model",
        help=f"merged: the base model, a folder or Hub id. Otherwise one of {', '.join(FAMILIES)}, where the adapter "
        "does not note its model.",
    )
    args = parser.parse_args(arguments)
    try:
        if args.format == "merged":
            if args.model is None:
                parser.error("--format merged needs --model, the base model.")
            pipeline = load_pipeline(args.model, DTYPES[args.dtype])
            for name, merged in merge_adapter(pipeline, args.folder, args.output).items():
                print(f"{args.output}/{name}: {merged.changed:,} of {merged.weights:,} weights of {merged.modules} "
                      "modules changed")  # fmt: skip
        else:
            for path in export_adapter(args.folder, args.output, args.format, dtype=args.dtype, model=args.model):
                print(path)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
