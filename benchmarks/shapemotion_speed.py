"""Print how many clips per second ShapeMotion lays out, renders and verifies (17 frames, 64 x 64).

python benchmarks/shapemotion_speed.py [--device cuda] [--num_clips 512] [--threads 2]
"""

import argparse
import statistics
import time

import torch

from pisces_rl.shapemotion import render_layout, sample_layouts, verify


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cpu", help="Device for layout and rendering; verification runs on the CPU."
    )
    parser.add_argument("--num_clips", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator(args.device).manual_seed(0)

    def clock(work, repeats=5):  # median of `repeats`, after one to warm up
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            out = work()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return out, statistics.median(seconds[1:])

    n = args.num_clips
    (specs, layout), layout_seconds = clock(lambda: sample_layouts(n, "train", generator=generator))
    videos, render_seconds = clock(lambda: render_layout(layout))
    prompts, text_seconds = clock(lambda: [scene.prompt() for scene in specs.scenes()])
    few, few_prompts = videos[:48].cpu(), prompts[:48]
    _, verify_seconds = clock(lambda: verify(few, few_prompts))
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, {n} clips")
    print("| work | clips/s |\n|---|---|")
    for name, rate in (
        ("sample and lay out", n / layout_seconds),
        ("prompt text", n / text_seconds),
        ("render", n / render_seconds),
        ("sample, lay out and render", n / (layout_seconds + render_seconds)),
        (f"verify (48 clips, {verify_seconds:.3f} s)", 48 / verify_seconds),
    ):
        print(f"| {name} | {rate:,.0f} |")


if __name__ == "__main__":
    main()
