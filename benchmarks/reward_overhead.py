"""Measure the cost of optimal transport in a reward call: ms per video for encoding, plans and matching.

    python benchmarks/reward_overhead.py                          # both models of the table, on a GPU
    python benchmarks/reward_overhead.py --models tiny-vtm --device cpu

tiny-vtm on 8 videos of 17 x 64 x 64 in fp32, and a model of InternVideo2's size with random weights on 8 videos of
8 x 224 x 224 in bf16, with ShapeMotion's prompts (at most 26 tokens), and again with prompts that fill its 40 tokens.
`matching` is the plain matching head on encoded features, `plans` the extra time to fuse its attention with transport
plans, `map` the quality reward's map and cosine. Times are medians of 20 calls after 5 warm-up calls.
"""

import argparse
import time

import torch

from pisces_rl.ot.maps import LinearMap
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.encoders.encoder import VideoTextEncoder
from pisces_rl.rewards.encoders.internvideo2 import InternVideo2, InternVideo2Config
from pisces_rl.rewards.ot_attention import OTAttention
from pisces_rl.shapemotion import load_prompts

VIDEOS = 8
SIZES = {"tiny-vtm": (17, 64), "internvideo2": (8, 224)}
LONG = {"internvideo2": 40}  # tokens of the prompts in a second row


def build(name: str, device: str):
    if name == "tiny-vtm":
        return load_encoder(name, device=device)
    tokenizer = load_encoder(
        "tiny-vtm", device="cpu"
    ).tokenizer  # words of ShapeMotion; the model's weights are random
    with torch.device(device):
        model = InternVideo2(InternVideo2Config(), tokenizer)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def medians(device: str, *calls) -> list[float]:
    """Return ms per video of each call; calls alternate, so that other load slows all of them equally."""
    seconds = [[] for _ in calls]
    for _ in range(25):
        for call, own in zip(calls, seconds):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [sorted(own[5:])[10] * 1000 / VIDEOS for own in seconds]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    columns = ("model", "videos", "texts", "matching", "plans", "map", "plans / encoding %", "peak GiB")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in args.models:
        encoder = build(name, args.device)
        prompts = load_prompts("train", VIDEOS)["prompt"]
        report(name, encoder, prompts, *SIZES[name], args.device)
        if name in LONG:
            words = [(prompt.replace(",", "") + " ") * LONG[name] for prompt in prompts]
            long = [" ".join(text.split()[: LONG[name] - 2]) for text in words]  # plus the two special tokens
            assert encoder.encode_text(long).words.sum(1).tolist() == [LONG[name] - 2] * VIDEOS
            report(f"{name}, {LONG[name]} tokens", encoder, long, *SIZES[name], args.device)


def report(label: str, encoder: VideoTextEncoder, prompts: list[str], frames: int, size: int, device: str) -> None:
    """Print a row of the table."""
    videos = torch.rand(VIDEOS, frames, 3, size, size, device=device)
    text, video = encoder.encode_text(prompts), encoder.encode_video(videos)
    points = torch.randn(2048, encoder.dimension)
    linear = LinearMap().fit(points, points * 2)
    fusion = OTAttention().bind(text.words, video.positions, encoder.fused_layers)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    of_videos, of_texts, plain, fused, image = medians(
        device,
        lambda: encoder.encode_video(videos),
        lambda: encoder.encode_text(prompts),
        lambda: encoder.match(text, video),
        lambda: encoder.match(text, video, fusion),
        lambda: torch.cosine_similarity(linear(text.pooled), video.pooled),
    )
    share = 100 * (fused - plain) / (of_videos + of_texts)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    cells = [f"{x:.3f}" for x in (of_videos, of_texts, plain, fused - plain, image)]
    print(f"| {label} | " + " | ".join(cells) + f" | {share:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
