"""Options of the commands that sample from a model. This file does not import torch, so that --help is fast."""

import argparse
import json


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options for the model, adapter, seed, size and number format."""
    parser.add_argument("--model", required=True, help="A Hub id, a folder with a pipeline, or a built-in model.")
    parser.add_argument(
        "--adapter",
        help="Folder of a run, a LoRA or trained components, or a LoRA's file or Hub id; unset: the base model.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of all noise; use the same one for models you compare."
    )
    parser.add_argument(
        "--batch_size", type=_positive, default=1, help="Videos per call of the pipeline, on each process."
    )
    parser.add_argument("--fps", type=float, default=8, help="Frames per second of the video files.")
    parser.add_argument("--num_inference_steps", type=int, help="Denoising steps; unset: as in training.")
    parser.add_argument("--guidance_scale", type=float, help="Unset: the pipeline's default.")
    for name in ("height", "width", "num_frames"):
        parser.add_argument(f"--{name}", type=int, help="Unset: the pipeline's default.")
    parser.add_argument(
        "--pipeline_kwargs", type=_json_object, default={}, help="Other arguments of the pipeline's call, as JSON."
    )
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="Unset: only on a GPU.")


def sampling_call(args: argparse.Namespace) -> dict:
    """Return the arguments of the pipeline's call."""
    names = ("guidance_scale", "height", "width", "num_frames")
    return args.pipeline_kwargs | {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _positive(text: str) -> int:
    if (value := int(text)) < 1:  # argparse reports a ValueError
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _json_object(text: str) -> dict:
    value = json.loads(text)  # argparse reports a ValueError
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object such as '{\"max_sequence_length\": 512}'")
    return value
