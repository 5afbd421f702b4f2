"""Evaluate the semantic reward's transport plans by matching accuracy on pairs with a known order.

    python benchmarks/ot_semantic_table.py outputs/vtm/vtm-0 ... outputs/vtm/vtm-4            # the table: test splits
    python benchmarks/ot_semantic_table.py outputs/vtm/vtm-? --sweep                          # the sweep: train split

These take 15 and 5 minutes per encoder on one CPU core. --json keeps measured results and skips them the next time.

A pair is right if the model's margin (log-odds of "matches") is higher for the better of two; ties count half.
    relation, binding   rendered clips; the true caption against one with a swapped relation, or two swapped colors
    unseen              rendered clips of compositions that the encoder never saw; one wrong attribute of any kind
    samples             two of tiny-wan's samples of one prompt whose alignment, by the verifier, differs by 0.2
Values are means over encoders (seeds). The cut is 1 - error / error of vanilla, over all pairs of the four sets, with
a 95 % t-interval over seeds.
"""

import argparse
import functools
import json
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from tiny_vtm_ranking import draw

sys.path.insert(0, str(Path(__file__).parents[1] / "assets_src"))
from shapemotion_swaps import swap

from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.encodings import shared_encodings
from pisces_rl.rewards.ot_attention import OTAttention
from pisces_rl.rewards.semantic import OTSemanticReward
from pisces_rl.shapemotion import render_layout, sample_layouts, verify

SETS = ("relation", "binding", "unseen", "samples")
SEEN, UNSEEN = "test_seen", ("test_color_shape", "test_shape_motion")
NO_PLACE = dict(temporal=0.0, spatial=0.0)
LOG = functools.partial(OTAttention, fusion="log")
PARTIAL = functools.partial(LOG, plan="partial")
TABLE = {
    "vanilla": None,
    "balanced, log": LOG(plan="balanced", **NO_PLACE),
    "balanced, log, spatial": LOG(plan="balanced", temporal=0.0),
    "balanced, log, temporal": LOG(plan="balanced", spatial=0.0),
    "balanced, log, both": LOG(plan="balanced"),
    "balanced, arithmetic, both": OTAttention(plan="balanced", fusion="arithmetic"),
    "unbalanced, log (= published plan)": LOG(plan="unbalanced", **NO_PLACE),
    "unbalanced, log, both": LOG(plan="unbalanced"),
    "as published: floor 1e-6, class token, both": LOG(plan="unbalanced", floor=1e-6, class_tokens=True),
    "unbalanced, arithmetic, both": OTAttention(plan="unbalanced", fusion="arithmetic"),
    "unbalanced, gated, both": OTAttention(plan="unbalanced", fusion="gated"),
    "unbalanced .5, gated, eps 1": OTAttention(plan="unbalanced", fusion="gated", mass=0.5, reg=1.0, **NO_PLACE),
    "partial .9, log": PARTIAL(**NO_PLACE),
    "partial .9, log, spatial": PARTIAL(temporal=0.0),
    "partial .9, log, temporal": PARTIAL(spatial=0.0),
    "partial .9, log, both": PARTIAL(),
    "partial .7, log, both": PARTIAL(mass=0.7),
    "partial .5, log, both": PARTIAL(mass=0.5),
    "partial .9, arithmetic, both": PARTIAL(fusion="arithmetic"),
    "as first released: partial .9, arithmetic, class token, gamma .1, eta .2, no normalisation": PARTIAL(
        fusion="arithmetic", temporal=0.1, class_tokens=True, normalise=False
    ),
    "partial .5, arithmetic, both": PARTIAL(fusion="arithmetic", mass=0.5),
    "partial .9, gated, both": PARTIAL(fusion="gated"),
    "partial .5, gated, both": PARTIAL(fusion="gated", mass=0.5),
}
SWEEP = {"vanilla": None} | {
    f"{plan}, {fusion}, gamma {gamma}, eta {eta}, eps {reg}, m {mass}": OTAttention(
        plan=plan, fusion=fusion, temporal=gamma, spatial=eta, reg=reg, mass=mass
    )
    for plan, places, regs in (
        ("unbalanced", ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.2, 0.2), (1.0, 1.0)), (0.05, 0.2, 1.0)),
        ("partial", ((0.0, 0.0), (0.2, 0.2)), (0.05, 0.2)),
    )
    for fusion in ("log", "arithmetic", "gated")
    for gamma, eta in places
    for reg in regs
    for mass in (0.9, 0.5)
}


def swaps(splits: tuple[str, ...], attribute: str | None, count: int, seed: int) -> tuple:
    """Return clips, their captions and wrong captions, at most `count` per split."""
    videos, right, wrong = [], [], []
    for split in splits:
        generator = torch.Generator().manual_seed(seed)
        specs, layout = sample_layouts(12 * count if attribute else 3 * count, split, generator=generator)
        other, _, valid = swap(specs, generator, attribute, split)
        rows = valid.nonzero()[:count, 0]
        videos.append(render_layout(layout[rows], size=64))
        right += [scene.prompt() for scene in specs[rows].scenes()]
        wrong += [scene.prompt() for scene in other[rows].scenes()]
    return torch.cat(videos), right, wrong


def sampled(splits: tuple[str, ...], prompts: int, group: int = 8, most: int = 4, seed: int = 0) -> tuple:
    """Return samples, their prompts, and (pairs, 2) rows with the better one first."""
    texts, videos, pairs = [], [], []
    for split in splits:
        some, clips = draw(split, prompts, group, 4, seed)
        truth = np.asarray(verify(clips, some).alignment)
        for first in range(0, len(some), group):
            rows = [
                (i, j) if truth[i] > truth[j] else (j, i)
                for i, j in combinations(range(first, first + group), 2)
                if abs(truth[i] - truth[j]) >= 0.2
            ]
            chosen = np.random.default_rng(first).permutation(len(rows))[:most]
            pairs += [[k + len(texts) for k in rows[i]] for i in chosen]
        texts, videos = texts + some, [*videos, clips]
    return torch.cat(videos), texts, torch.tensor(pairs)


def problems(validation: bool, count: int) -> tuple[dict, tuple]:
    seen, unseen, seed = (("train",), ("train",), 31) if validation else ((SEEN,), UNSEEN, 30)
    sets = {
        "relation": swaps(seen + (unseen if not validation else ()), "relation", count, seed),
        "binding": swaps(seen + (unseen if not validation else ()), "binding", count, seed + 100),
        "unseen": swaps(unseen, None, 2 * count, seed + 200),
    }
    return sets, sampled(seen + (unseen if not validation else ()), 64, seed=1 if validation else 0)


@torch.no_grad()
def measure(encoder, attention: OTAttention | None, sets: dict, samples: tuple) -> dict[str, float]:
    """Return the accuracy on each set."""
    reward, result = OTSemanticReward(encoder, attention, micro_batch=256), {}
    for name, (videos, right, wrong) in sets.items():
        result[name] = accuracy(margins(reward, right, videos) - margins(reward, wrong, videos))
    videos, texts, pairs = samples
    values = margins(reward, texts, videos)
    result["samples"] = accuracy(values[pairs[:, 0]] - values[pairs[:, 1]])
    return result


def margins(reward: OTSemanticReward, prompts: list[str], videos: torch.Tensor) -> torch.Tensor:
    logits = reward.logits(prompts, videos)
    return logits[:, 1] - logits[:, 0]


def accuracy(gap: torch.Tensor) -> float:
    return float(((gap > 0).double() + (gap == 0).double() / 2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="tiny-vtm, or folders of such models")
    parser.add_argument("--sweep", action="store_true", help="test many settings, on the train split")
    parser.add_argument("--count", type=int, default=150, help="maximum number of swaps per set and split")
    parser.add_argument("--variants", nargs="+", help="only rows whose label contains one of these")
    parser.add_argument("--json", type=Path, help="file to keep all accuracies in")
    args = parser.parse_args()
    variants = SWEEP if args.sweep else TABLE
    if args.variants:
        variants = {k: v for k, v in variants.items() if k == "vanilla" or any(x in k for x in args.variants)}
    kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.is_file() else {}
    start = time.time()
    sets, samples = problems(args.sweep, args.count)
    sizes = {k: len(v[1]) for k, v in sets.items()} | {"samples": len(samples[2])}
    print(f"{sizes}  {time.time() - start:.0f} s", flush=True)
    found = []
    for folder in args.encoders:
        encoder = load_encoder(folder)
        own = kept.setdefault(f"{encoder.name} {'sweep' if args.sweep else 'table'} {args.count}", {})
        with shared_encodings():
            for label, attention in variants.items():
                if label not in own:
                    own[label] = measure(encoder, attention, sets, samples)
                    if args.json:
                        args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        found.append(own)
        print(f"{encoder.name}  {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    print("| variant | " + " | ".join(SETS) + " | mean | error cut % |\n" + "|---" * (len(SETS) + 3) + "|")
    base = np.array([[1 - f["vanilla"][s] for s in SETS] for f in found]).mean(1)
    for label in variants:
        table = np.array([[f[label][s] for s in SETS] for f in found])
        cut = 100 * (1 - (1 - table).mean(1) / base)
        half = student.ppf(0.975, len(cut) - 1) * cut.std(ddof=1) / len(cut) ** 0.5 if len(cut) > 1 else float("nan")
        cells = [f"{100 * value:.1f}" for value in (*table.mean(0), table.mean())]
        print(
            f"| {label} | "
            + " | ".join(cells)
            + f" | {cut.mean():.1f} [{cut.mean() - half:.1f}, {cut.mean() + half:.1f}] |"
        )


if __name__ == "__main__":
    main()
