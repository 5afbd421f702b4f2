"""Measure the overhead of a reward server over the same reward in-process: ms per video on loopback.

    python benchmarks/reward_server.py                         # 4 videos of 33 x 240 x 416, lossless and as mp4

The reward returns 1 immediately. The clips are smooth (upsampled noise of an eighth of the size), which mp4 compresses
well. The server is a separate process on this machine. Times are the median and the fastest of `--calls` calls after a
warm-up call.
"""

import argparse
import subprocess
import sys
import time

import torch

from pisces_rl.rewards import RewardPanel
from pisces_rl.rewards.server.wire import ScoreRequest, pack_request


def one(prompts):
    return [1.0] * len(prompts)


def milliseconds(panel: RewardPanel, videos: torch.Tensor, calls: int) -> list[float]:
    """Return the time per video of each call, sorted; the first call, which opens connections, is excluded."""
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        panel(["a red circle"] * len(videos), videos, {})
        seconds.append(time.perf_counter() - start)
    return sorted(1000 * s / len(videos) for s in seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=3, default=(33, 240, 416), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--calls", type=int, default=9)
    args = parser.parse_args()
    frames, height, width = args.size
    small = torch.rand(args.videos, 3, frames, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    videos = torch.nn.functional.interpolate(small, (frames, height, width), mode="trilinear").transpose(1, 2)
    videos = videos.contiguous()
    command = [sys.executable, "-m", "pisces_rl.command", "serve", "--rewards", f"{__file__}:one"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[1]
            print("| frames | MB a video | ms a video, median | fastest |\n|---|---|---|---|")
            inside = milliseconds(RewardPanel(one), videos, args.calls)
            print(f"| inside | | {inside[args.calls // 2]:.1f} | {inside[0]:.1f} |", flush=True)
            for kind in ("lossless", "mp4"):
                size = len(pack_request(ScoreRequest(["a"] * len(videos), videos, {}, None), kind)) / len(videos) / 1e6
                spent = milliseconds(RewardPanel(f"{url}?frames={kind}"), videos, args.calls)
                print(f"| {kind} | {size:.2f} | {spent[args.calls // 2]:.1f} | {spent[0]:.1f} |", flush=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
