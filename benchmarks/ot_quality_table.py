"""Compare maps for the quality reward: alignment of mapped text with video features, and the cosine as a reward.

    python benchmarks/ot_quality_table.py outputs/vtm/vtm-0 ... outputs/vtm/vtm-4 [--neural]

For each encoder, maps from text to video features are fitted on clips of the train split and evaluated on unseen clips
of that split: mutual-kNN (k = 10) and Spearman of pairwise distances between mapped texts and videos, and recall@1.
`reward` is Spearman's correlation of cos(T(text), video) with the verifier's alignment over all of tiny-wan's samples
of the test splits; `within` is its mean within the samples of one prompt. The last rows are only the divergence's
credit, with a bank of real clips and with a random bank. Means over encoders (seeds), 95 % t-intervals.
    shuffled    the linear map with its output coordinates permuted: unaligned with the videos
    neural      at the published settings for --steps steps, and on top of the linear map
"""

import argparse
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from ot_semantic_table import SEEN, UNSEEN
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from scipy.stats import t as student
from tiny_vtm_ranking import draw
from torch.nn.functional import cosine_similarity, normalize

from pisces_rl.ot import BankDivergence
from pisces_rl.ot.maps import EntropicMap, IdentityMap, LinearMap, MeanShiftMap, NeuralMap, RegressedMap, ShuffledMap
from pisces_rl.ot.metrics import default_blur, distance_spearman, mutual_knn, paired_recall
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.shapemotion import render_layout, sample_layouts, verify

COLUMNS = ("mutual-kNN", "Spearman", "recall@1", "reward", "within")
MAPS = {
    "raw": IdentityMap,
    "L2-regressed": RegressedMap,
    "mean shift": MeanShiftMap,
    "linear": LinearMap,
    "shuffled": ShuffledMap,
    "entropic on linear": EntropicMap,
}
GROUP = 8


def clips(count: int, seed: int, size: int = 512):
    """Yield batches of rendered clips of the train split with their captions."""
    for first in range(0, count, size):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        specs, layout = sample_layouts(min(size, count - first), "train", generator=generator)
        yield [scene.prompt() for scene in specs.scenes()], render_layout(layout, size=64)


def features(encoder, batches) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(encoder.encode_text(texts).pooled, encoder.encode_video(videos).pooled) for texts, videos in batches]
    return tuple(torch.cat(part).cpu() for part in zip(*parts))


def rankings(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    rows = list(zip(scores.reshape(-1, GROUP), truth.reshape(-1, GROUP)))
    within = [spearmanr(s, t).statistic for s, t in rows if np.ptp(t) > 0 and np.ptp(s) > 0]
    return spearmanr(scores, truth).statistic, float(np.mean(within))


@torch.no_grad()
def cached_features(name: str, count: int) -> dict[str, torch.Tensor]:
    """Return one encoder's features of the clips to fit on, of unseen clips and of samples; cached in outputs/."""
    cache = Path(f"outputs/ot_quality/{Path(name).name}-{count}.safetensors")
    if not cache.is_file():
        encoder = load_encoder(name)
        parts = [draw(split, 64, GROUP, 4) for split in (SEEN, *UNSEEN)]
        texts, videos = [t for part, _ in parts for t in part], torch.cat([v for _, v in parts])
        batches = zip((texts[i : i + 128] for i in range(0, len(texts), 128)), videos.split(128))
        found = {}
        for part, data in (("", clips(count, 0)), ("test_", clips(1024, 77)), ("drawn_", batches)):
            found[f"{part}text"], found[f"{part}video"] = features(encoder, data)
        found["alignment"] = torch.as_tensor(verify(videos, texts).alignment)
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in found.items()}, cache)
    return load_file(cache)


@torch.no_grad()
def measure(name: str, args) -> dict[str, tuple[float, ...]]:
    warnings.simplefilter("ignore")
    found = cached_features(name, args.clips)
    text, video, test_text, test_video = (found[k] for k in ("text", "video", "test_text", "test_video"))
    prompts, drawn, truth = found["drawn_text"], found["drawn_video"], found["alignment"].numpy()
    kinds = dict(MAPS)
    if args.neural:
        kinds |= {
            "neural": lambda: NeuralMap(steps=args.steps, patience=10**6),
            "neural on linear": lambda: NeuralMap(skip="linear", steps=args.steps, patience=10**6),
        }
    rows = {}

    def add(name: str, map_) -> None:
        image = map_(test_text)
        rows[name] = (
            mutual_knn(image, test_video).value,
            distance_spearman(image, test_video).value,
            paired_recall(image, test_video)[1].value,
            *rankings(cosine_similarity(map_(prompts), drawn).numpy(), truth),
        )

    for name, kind in kinds.items():
        with torch.enable_grad():
            fitted = kind().fit(text, video)
        add(name, fitted)
    noise = normalize(torch.randn(2048, video.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    for name, bank in (("credit, real bank", video[:2048]), ("credit, random bank", noise)):
        divergence = BankDivergence(bank, blur=default_blur(bank))
        credit = -divergence.per_sample(drawn.unflatten(0, (-1, GROUP))).flatten()
        rows[name] = (*3 * (float("nan"),), *rankings(credit.numpy(), truth))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="tiny-vtm, or folders of such models")
    parser.add_argument("--clips", type=int, default=4096, help="to fit on")
    parser.add_argument("--neural", action="store_true", help="also fit the neural maps; needs a GPU")
    parser.add_argument("--steps", type=int, default=5000, help="of the neural maps")
    parser.add_argument("--jobs", type=int, default=1, help="encoders at a time")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(measure, args.encoders, [args] * len(args.encoders)))
    print("| map | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for row in found[0]:
        values = np.array([f[row] for f in found])
        half = student.ppf(0.975, len(found) - 1) * values.std(0, ddof=1) / len(found) ** 0.5
        cells = ["" if np.isnan(m) else f"{m:.3f} +- {h:.3f}" for m, h in zip(values.mean(0), half)]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
