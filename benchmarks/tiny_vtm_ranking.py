"""Test whether tiny-vtm's scores rank a policy's samples as the verifier does.

    python benchmarks/tiny_vtm_ranking.py                                  # the shipped models, on tiny-wan's samples
    python benchmarks/tiny_vtm_ranking.py --encoders outputs/vtm/vtm-0     # other models, from folders

tiny-wan samples several videos per prompt, as GRPO does. The table has Spearman's correlation with the verifier's
alignment over all samples, and its mean within the groups of one prompt in which alignment varies, which is what
advantages depend on; 95 % intervals by bootstrap over prompts.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from scipy.stats import spearmanr
from tiny_wan_scores import sample

from pisces_rl.assets import asset_path
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.quality import OTQualityReward
from pisces_rl.rewards.semantic import OTSemanticReward
from pisces_rl.shapemotion import load_prompts, verify

RESAMPLES = 1000


def draw(split: str, prompts: int, group: int, steps: int, seed: int = 0) -> tuple[list[str], torch.Tensor]:
    """Return prompts, each `group` times, and their samples (n, 17, 3, 64, 64); cached in outputs/."""
    texts = [p for p in load_prompts(split, prompts, seed=seed)["prompt"] for _ in range(group)]
    cache = Path(f"outputs/samples/{split}-{prompts}x{group}-{steps}-{seed}.pt")
    if not cache.is_file():
        pipe = WanPipeline.from_pretrained(asset_path("tiny-wan"), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        videos = sample(pipe, texts, steps, 1.0, seed, 32)
        cache.parent.mkdir(parents=True, exist_ok=True)
        own = cache.with_suffix(f".{os.getpid()}")  # several of these scripts may run in parallel
        torch.save((videos * 255).round().byte(), own)
        own.replace(cache)
    return texts, torch.load(cache).float() / 255


def correlations(scores: np.ndarray, truth: np.ndarray, generator: np.random.Generator) -> list[str]:
    """Return the correlation over all (prompts, group) scores and its mean within rows, each with its interval."""
    pairs = list(zip(scores, truth))
    within = np.array([spearmanr(s, t).statistic if np.ptp(t) > 0 and np.ptp(s) > 0 else np.nan for s, t in pairs])
    draws = generator.integers(len(scores), size=(RESAMPLES, len(scores)))
    overall = [spearmanr(scores[rows].ravel(), truth[rows].ravel()).statistic for rows in draws]
    values = (
        (spearmanr(scores.ravel(), truth.ravel()).statistic, overall),
        (np.nanmean(within), np.nanmean(within[draws], 1)),
    )
    return ["{:.3f} [{:.3f}, {:.3f}]".format(value, *np.percentile(spread, [2.5, 97.5])) for value, spread in values]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["tiny-vtm", "tiny-vtm-judge"])
    parser.add_argument("--splits", nargs="+", default=["test_seen", "test_color_shape", "test_shape_motion"])
    parser.add_argument("--prompts", type=int, default=64, help="a split")
    parser.add_argument("--group", type=int, default=8, help="samples a prompt")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    print("| encoder | split | score | Spearman, all samples | within a prompt |\n|---|---|---|---|---|")
    for split in args.splits:
        texts, videos = draw(split, args.prompts, args.group, args.steps)
        truth = np.asarray(verify(videos, texts).alignment).reshape(args.prompts, args.group)
        for name in args.encoders:
            encoder = load_encoder(name)
            logits = OTSemanticReward(encoder).logits(texts, videos)
            scores = {"cosine": OTQualityReward(encoder)(texts, videos), "match logit": logits[:, 1] - logits[:, 0]}
            for label, values in scores.items():
                values = values.cpu().numpy().reshape(truth.shape)
                cells = correlations(values, truth, generator)
                print(f"| {encoder.name.split('@')[0]} | {split} | {label} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
