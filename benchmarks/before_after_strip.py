"""Make the README's animation: a run's first samples above its last, for the same prompts and noise.

make demo
python benchmarks/before_after_strip.py outputs/shapemotion_rvm --output docs/images/before_after.webp
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pisces_rl.media import load_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="an output folder")
    parser.add_argument("--set", default="test_seen", help="an evaluation set")
    parser.add_argument("--videos", type=int, nargs="+", default=range(8), help="which of its samples")
    parser.add_argument("--size", type=int, default=128, help="size of each video in pixels")
    parser.add_argument("--output", type=Path, default=Path("docs/images/before_after.webp"))
    args = parser.parse_args()
    steps = sorted((args.run / "samples").glob("step_*"))
    rows = []
    for step in (steps[0], steps[-1]):
        videos = [load_video(step / args.set / f"{i:03d}.mp4") for i in args.videos]
        rows.append(np.concatenate([np.pad(v.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2))) for v in videos], 3))
    frames = (np.concatenate(rows, 2).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    scale = args.size / (rows[0].shape[2] - 4)
    size = round(frames.shape[2] * scale), round(frames.shape[1] * scale)
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    first, *rest = pictures
    first.save(args.output, save_all=True, append_images=rest, duration=125, loop=0, quality=80, method=6)
    kibibytes = args.output.stat().st_size / 1024
    print(f"{args.output}: {len(pictures)} frames of {size[0]} x {size[1]}, {kibibytes:.0f} KiB")


if __name__ == "__main__":
    main()
