"""`pisces-rl sample`: sample videos before and after training, from the same prompts and noise."""

import argparse
from pathlib import Path

from pisces_rl.evaluation.sampling_arguments import add_sampling_arguments, sampling_call

SHEET_VIDEOS = 24  # a sheet of more is too large to view


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="A prompt; may be repeated.")
    prompts.add_argument("--prompts", metavar="FILE", help="A .txt, .csv, .json or .jsonl file, or a Hub dataset.")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="Folder for the videos.")
    add_sampling_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Write `before/000.mp4`, ... and, with an adapter, `after/000.mp4`, ..., and a sheet of the first 24 videos,
    `before_after.png` (or `before.png`). Video i starts from the noise of seed `--seed` + i in both."""
    import torch

    from pisces_rl.evaluation.sampling_policy import add_trained, sampling_policy
    from pisces_rl.media import before_after_sheet, check_mp4, contact_sheet, save_video

    from .arguments import load_prompt_dataset

    check_mp4(args.fps)
    prompts = list(args.prompt or load_prompt_dataset(args.prompts)["prompt"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    policy, _ = sampling_policy(
        args.model, num_inference_steps=args.num_inference_steps, call=sampling_call(args), bf16=bf16
    )

    def sample(name: str) -> torch.Tensor:
        policy.place(device)
        shown = []
        for start in range(0, len(prompts), args.batch_size):
            part = prompts[start : start + args.batch_size]
            seeds = list(range(args.seed + start, args.seed + start + len(part)))
            for seed, video in zip(seeds, policy.sample(part, noise_seeds=seeds).videos.float().cpu()):
                save_video(video, args.output / name / f"{seed - args.seed:03d}.mp4", args.fps)
                if len(shown) < SHEET_VIDEOS:
                    shown.append(video)
        return torch.stack(shown)

    before, captions = sample("before"), prompts[:SHEET_VIDEOS]
    if args.adapter is None:
        sheet = contact_sheet(before, captions, args.output / "before.png")
    else:
        add_trained(policy, args.adapter)
        sheet = before_after_sheet(before, sample("after"), captions, args.output / "before_after.png")
    print(f"{len(prompts)} prompts: {args.output}; {sheet}")
