"""Time Wan's VAE decoder in ms per video: diffusers' loop and chunks of latent frames, plain and compiled; one GPU.

    python benchmarks/decoder_speed.py              # 33 x 240 x 416 in bf16, random weights
    python benchmarks/decoder_speed.py --tiny       # the same code path on a CPU

`dB`: signal-to-error ratio, 10 log10(4 / mean square error), against the fp32 VAE and against diffusers' bf16
decoding. Two bf16 kernels differ from each other as much as one differs from fp32.
"""

import argparse
import copy
import math
import time

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from pisces_rl.policy.fast.chunked_decoder import decode_in_chunks

SHAPES = {"tiny": (3, 4, 6), "full": (9, 30, 52)}  # latent frames, rows, columns


def decibels(found: Tensor, expected: Tensor) -> float:
    error = float((found.double() - expected.double()).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


@torch.no_grad()
def measure(vae: AutoencoderKLWan, latents: Tensor, repeats: int) -> tuple[float, Tensor, float]:
    """Return milliseconds per video, the videos, and peak GiB."""
    on_gpu = latents.is_cuda
    for _ in range(2):  # compilation, then what the allocator keeps
        videos = vae.decode(latents).sample
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(repeats):
        videos = vae.decode(latents).sample
    if on_gpu:
        torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - start) / repeats / len(latents)
    return milliseconds, videos, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on a CPU in fp32, not compiled")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8], help="latent frames at a time, compiled")
    parser.add_argument("--videos", type=int, nargs="+", default=[1, 4], help="at once")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--plain", type=int, nargs="*", default=[2, 4, 8], help="also time these chunks without compilation"
    )
    parser.add_argument("--cudnn_benchmark", action="store_true", help="let cuDNN time its kernels")
    args = parser.parse_args()
    device, dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    size = dict(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1) if args.tiny else {}
    whole = AutoencoderKLWan(**size).eval().requires_grad_(False).to(device)
    vae = copy.deepcopy(whole).to(dtype)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark  # also of diffusers' own loop
    print("| videos | latent frames at a time | compiled | ms a video | GiB | dB to fp32 | dB to diffusers |")
    print("|---" * 7 + "|")
    for count in args.videos:
        latents = torch.randn(count, 16, *SHAPES["tiny" if args.tiny else "full"], device=device).to(dtype)
        with torch.no_grad():
            exact = torch.cat([whole.decode(own.float()).sample for own in latents.split(1)])
        plain = None
        for frames, compiled in [
            (None, False),
            *((n, False) for n in args.plain),
            *((n, True) for n in args.chunks if not args.tiny),
        ]:
            decode_in_chunks(vae, frames, compiled, args.cudnn_benchmark and frames is not None)
            milliseconds, videos, memory = measure(vae, latents, args.repeats)
            plain = videos if plain is None else plain
            print(
                f"| {count} | {frames or 'one (diffusers)'} | {'yes' if compiled else 'no'} | {milliseconds:.1f} | "
                f"{memory:.1f} | {decibels(videos, exact):.1f} | {decibels(videos, plain):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
