"""Test whether transport helps an encoder with unaligned texts and videos: maps fitted on few pairs, or on none.

    python benchmarks/unaligned_maps.py --encoders outputs/unaligned --seeds 0 1 2 3 4 --output outputs/unaligned_maps

The encoders are those of assets_src/train_unaligned.py. A cell is a variant and a number N of pairs; every map of a
cell gets the same N pairs, the same 4,096 captions and 4,096 other clips without pairs, and nothing else. Measures on
1,024 unseen clips of the train split: the gap |mean text - mean video|, mutual-kNN (k = 10), recall@1; and on
tiny-wan's samples (64 prompts of each of three test splits, 8 each): Spearman's correlation of cos(T(text), video)
with the verifier's alignment over all samples (`reward`), and its mean within a prompt (`within`).

Maps without transport: raw; mean shift; Procrustes, ridge, kernel ridge and CCA on the pairs.
Maps with transport: linear (Bures) and entropic on the unpaired clouds; ridge, then linear or entropic transport of
its image; keypoints (Gu et al. 2022: the cost of a text and a clip is the squared Hellinger distance of their softmax
similarities to the pairs) and fused Gromov-Wasserstein with that cost (Vayer et al. 2019, POT), each followed by ridge
over the plan's barycentres and the pairs; with --neural the published neural map, raw and on ridge,
in the cell of the comparison.

Encoders: train_unaligned.py --steps 1000 --bank_clips 60000, seeds 0 to 4.
The comparison, fixed before it was run: variant `alone`, N = 256. The best map of each family is chosen by the mean of
`reward` over the encoders on even prompts; on odd prompts, the paired difference transport - without, per encoder,
95 % t-interval. The second table prints it for every cell; only that of (alone, 256) is the claim.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import torch
from ot_quality_table import GROUP, clips, features
from ot_semantic_table import SEEN, UNSEEN
from scipy.stats import spearmanr
from scipy.stats import t as student
from tiny_vtm_ranking import draw
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "assets_src"))
from train_tiny_vtm import build_tokenizer
from train_unaligned import pair_bank

from pisces_rl.ot import transport_plan
from pisces_rl.ot.maps import EntropicMap, IdentityMap, LinearMap, MeanShiftMap, NeuralMap, RegressedMap
from pisces_rl.ot.metrics import mutual_knn, paired_recall
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.shapemotion import verify

Map = Callable[[Tensor], Tensor]
COLUMNS = ("gap", "mutual-kNN", "recall@1", "reward", "within")
WITHOUT = ("raw", "mean shift", "Procrustes", "ridge", "kernel ridge", "CCA")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
KEYPOINTS = 256
TEMPERATURE = 0.1  # of the similarities to keypoints
NEURAL_PAIRS = 256
REG = 0.02  # of the keypoint plan, whose costs lie in [0, 1]


def variants_of(pairs: list[int]) -> list[str]:
    return ["alone", *(f"{kind}-{n}" for kind in ("joint", "frozen") for n in pairs), "joint-all", "few"]


def cells(variants: list[str], pairs: list[int]) -> list[tuple[str, int]]:
    """(variant, pairs): an encoder trained on N pairs is mapped with those; one trained on none with 0 and each N."""
    found = []
    for variant in variants:
        count = variant.partition("-")[2]
        own = [int(count)] if count.isdigit() else [0, *pairs] if variant == "alone" else [max(pairs)]
        found += [(variant, n) for n in own]
    return found


# --- maps without transport ------------------------------------------------------------------------------------------


def procrustes(x: Tensor, y: Tensor) -> Map:
    """The rotation between centred pairs (Schoenemann 1966), and the shift."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, _, v = torch.linalg.svd((x - mean_x).T @ (y - mean_y))
    return lambda z: (z - mean_x) @ (u @ v) + mean_y


def ridge(x: Tensor, y: Tensor) -> Map:
    """Least squares; the ridge with the smallest error on a fifth of the pairs."""
    cut = len(x) * 4 // 5
    errors = [(float((RegressedMap(r).fit(x[:cut], y[:cut])(x[cut:]) - y[cut:]).square().sum()), r) for r in RIDGES]
    return RegressedMap(min(errors)[1]).fit(x, y)


def kernel_ridge(x: Tensor, y: Tensor, most: int = 2048) -> Map:
    """Ridge with a Gaussian kernel as wide as the median distance; the ridge as for `ridge`."""
    x, y = x[:most].double(), y[:most].double()
    mean, width = y.mean(0), torch.cdist(x[:512], x[:512]).median().square()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a.double(), b).square() / width).exp()

    def solve(a: Tensor, b: Tensor, r: float) -> Tensor:
        return torch.linalg.solve(kernel(a, a) + r * torch.eye(len(a), dtype=a.dtype), b - mean)

    cut = len(x) * 4 // 5
    errors = [
        (float((kernel(x[cut:], x[:cut]) @ solve(x[:cut], y[:cut], r) + mean - y[cut:]).square().sum()), r)
        for r in RIDGES
    ]
    weights = solve(x, y, min(errors)[1])
    return lambda z: (kernel(z, x) @ weights + mean).float()


def cca(x: Tensor, y: Tensor, shrinkage: float = 0.05) -> tuple[Map, Map]:
    """Canonical correlations of the pairs, each coordinate weighed by its correlation; a map for either side."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)

    def whitening(z: Tensor) -> Tensor:
        covariance = z.T @ z / len(z)
        covariance += shrinkage * covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=z.dtype)
        values, vectors = torch.linalg.eigh(covariance)
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T

    white_x, white_y = whitening(x - mean_x), whitening(y - mean_y)
    u, s, v = torch.linalg.svd(white_x @ ((x - mean_x).T @ (y - mean_y) / len(x)) @ white_y)
    root = s.clamp(0, 1).sqrt()
    return (
        lambda z: ((z.double() - mean_x) @ white_x @ u * root).float(),
        lambda z: ((z.double() - mean_y) @ white_y @ v.T * root).float(),
    )


# --- maps with transport ---------------------------------------------------------------------------------------------


def keypoint_cost(x: Tensor, y: Tensor, keys_x: Tensor, keys_y: Tensor) -> Tensor:
    """(n, m): 1 - sum_k sqrt(p_ik q_jk) of the similarities p of texts and q of clips to the pairs' two sides.

    The cosines are of centred points; Gu et al. compare by Jensen-Shannon, which has no product form.
    """

    def relation(points: Tensor, keys: Tensor) -> Tensor:
        points, keys = normalize(points - keys.mean(0), dim=1), normalize(keys - keys.mean(0), dim=1)
        return (points @ keys.T / TEMPERATURE).softmax(1)

    return (1 - relation(x, keys_x).sqrt() @ relation(y, keys_y).sqrt().T).clamp(min=0)


def through_plan(plan: Tensor, x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> Map:
    """Ridge over the plan's barycentres, and over the pairs, which count as often as the barycentres."""
    images = plan @ y / plan.sum(1, keepdim=True)
    repeats = max(1, len(x) // len(pairs[0]))
    inputs = torch.cat([x, pairs[0].repeat(repeats, 1)])
    targets = torch.cat([images.to(y), pairs[1].repeat(repeats, 1)])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return ridge(inputs[order], targets[order])


def keypoints(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> Map:
    keys = [side[:KEYPOINTS] for side in pairs]
    plan = transport_plan(keypoint_cost(x, y, *keys), reg=REG)
    return through_plan(plan.plan, x, y, pairs)


def fused_gromov_wasserstein(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor], points: int) -> Map:
    """Half structure (distances within each side), half the keypoints' cost, on some of the points."""
    x, y = x[:points], y[:points]
    cost = keypoint_cost(x, y, *(side[:KEYPOINTS] for side in pairs)).double().numpy()
    inside = [torch.cdist(z, z).double().numpy() for z in (x, y)]
    weights = [np.full(len(z), 1 / len(z)) for z in (x, y)]
    plan = ot.gromov.fused_gromov_wasserstein(
        cost, *(z / z.max() for z in inside), *weights, alpha=0.5, max_iter=50, loss_fun="square_loss"
    )
    return through_plan(torch.from_numpy(plan).float(), x, y, pairs)


def fitted(
    x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor] | None, neural: bool, args
) -> dict[str, tuple[Map, Map | None]]:
    """{name: (map of texts, map of videos)} of a cell."""
    maps = {"raw": IdentityMap().fit(x, y), "mean shift": MeanShiftMap().fit(x, y)}
    transported = {"linear": LinearMap().fit(x, y), "entropic": EntropicMap().fit(x, y)}
    if neural:
        transported["neural"] = NeuralMap(steps=args.steps, patience=10**6).fit(x, y)
    both = {}
    if pairs is not None:
        maps |= {"Procrustes": procrustes(*pairs), "ridge": ridge(*pairs), "kernel ridge": kernel_ridge(*pairs)}
        both["CCA"] = cca(*pairs)
        with torch.no_grad():
            image = maps["ridge"](x)
        for name, kind in (("linear", LinearMap), ("entropic", EntropicMap)):
            then = kind().fit(image, y)
            transported[f"ridge, {name}"] = lambda z, then=then: then(maps["ridge"](z))
        if neural:
            then = NeuralMap(steps=args.steps, patience=10**6).fit(image, y)
            transported["ridge, neural"] = lambda z, then=then: then(maps["ridge"](z))
        transported["keypoints"] = keypoints(x, y, pairs)
        transported["fused GW"] = fused_gromov_wasserstein(x, y, pairs, args.gw_points)
    return {name: (map_, None) for name, map_ in (maps | transported).items()} | both


# --- measures --------------------------------------------------------------------------------------------------------


def sources(seed: int, drawn: tuple[list[str], Tensor], args) -> dict[str, list[tuple[list[str], Tensor]]]:
    """Batches of texts and videos (bytes): to fit on without pairs, the seed's pairs, unseen clips, and samples."""
    bank = pair_bank(max(args.pairs), seed, build_tokenizer())
    captions, (texts, videos) = [scene.prompt() for scene in bank.specs.scenes()], drawn

    def rendered(count: int, seed: int) -> list[tuple[list[str], Tensor]]:
        return [(text, (video * 255).round().byte()) for text, video in clips(count, seed)]

    return {
        "texts": rendered(args.clips, 7_000 + seed),
        "videos": rendered(args.clips, 8_000 + seed),
        "pairs": [(captions[i : i + 512], bank.videos[i : i + 512]) for i in range(0, len(captions), 512)],
        "unseen": rendered(args.unseen, 77),
        "drawn": [(texts[i : i + 128], videos[i : i + 128]) for i in range(0, len(texts), 128)],
    }


@torch.no_grad()
def encode(folder: Path, batches: dict, args) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the features (texts, videos) of each of the `sources`."""
    encoder = load_encoder(str(folder), device=args.device)
    return {
        name: features(encoder, ((text, video.to(args.device).float() / 255) for text, video in source))
        for name, source in batches.items()
    }


def rankings(scores: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Spearman over all samples of some prompts, and its mean within a prompt."""
    s, t = scores.reshape(-1, GROUP)[rows], truth.reshape(-1, GROUP)[rows]
    within = [spearmanr(a, b).statistic for a, b in zip(s, t) if np.ptp(a) > 0 and np.ptp(b) > 0]
    return float(spearmanr(s.ravel(), t.ravel()).statistic), float(np.mean(within))


def measure(folder: Path, batches: dict, counts: list[int], truth: np.ndarray, args) -> dict[str, dict[str, dict]]:
    """{pairs: {map: measures}} of an encoder; `even` and `odd` are `reward` on half of the prompts each."""
    found = encode(folder, batches, args)
    x, y = found["texts"][0], found["videos"][1]
    prompts = np.arange(len(truth) // GROUP)
    rows = {}
    for count in counts:
        pairs = tuple(side[:count] for side in found["pairs"]) if count else None
        measures = rows[str(count)] = {}
        neural = args.neural and folder.name.startswith("alone-") and count == NEURAL_PAIRS
        for name, (text_map, video_map) in fitted(x, y, pairs, neural, args).items():
            with torch.no_grad():
                image, drawn = text_map(found["unseen"][0]).float(), text_map(found["drawn"][0]).float()
                video = [v if video_map is None else video_map(v) for v in (found["unseen"][1], found["drawn"][1])]
            scores = cosine_similarity(drawn, video[1]).numpy()
            measures[name] = {
                "gap": float((image.mean(0) - video[0].mean(0)).norm()),
                "mutual-kNN": mutual_knn(image, video[0]).value,
                "recall@1": paired_recall(image, video[0])[1].value,
                **dict(zip(("reward", "within"), rankings(scores, truth, prompts))),
                "even": rankings(scores, truth, prompts[::2])[0],
                "odd": rankings(scores, truth, prompts[1::2])[0],
            }
    return rows


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half of the 95 % t-interval."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(half)


def tables(kept: dict, which: list[tuple[str, int]], seeds: list[int]) -> None:
    print("| encoder | pairs | map | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 3) + "|")
    compared = []
    for variant, count in which:
        found = [kept[f"{variant}-{seed}"][str(count)] for seed in seeds]
        for name in found[0]:
            values = [interval(np.array([f[name][column] for f in found])) for column in COLUMNS]
            print(f"| {variant} | {count} | {name} | " + " | ".join(f"{m:.3f} +- {h:.3f}" for m, h in values) + " |")
        best = {}
        for family in (False, True):
            names = [name for name in found[0] if (name not in WITHOUT) is family]
            best[family] = max(names, key=lambda name: np.mean([f[name]["even"] for f in found]))
        gain = interval(np.array([f[best[True]]["odd"] - f[best[False]]["odd"] for f in found]))
        mean = {name: [np.mean([f[name][column] for f in found]) for column in COLUMNS] for name in found[0]}
        chosen = [f"{name} {mean[name][COLUMNS.index('reward')]:.3f}" for name in ("raw", best[False], best[True])]
        shown = [f"{value:.3f}" for value in mean["raw"][:3]] + chosen + [f"{gain[0]:+.3f} +- {gain[1]:.3f}"]
        compared.append(f"| {variant} | {count} | {' | '.join(shown)} |")
    heads = (*COLUMNS[:3], "raw", "best without transport", "best with", "with - without, odd prompts")
    print(f"\n| encoder | pairs | {' | '.join(heads)} |\n" + "|---" * (len(heads) + 2) + "|", *compared, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoders", type=Path, required=True, help="folder that train_unaligned.py wrote")
    add(
        "--output",
        type=Path,
        required=True,
        help="folder of a JSON file per encoder; what is there is not measured again",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--pairs", type=int, nargs="+", default=[256, 1024, 4096])
    add("--variants", nargs="+", help="only these, for instance alone joint-256")
    add("--clips", type=int, default=4096, help="unpaired captions, and unpaired clips")
    add("--unseen", type=int, default=1024, help="clips for the gap, mutual-kNN and recall")
    add("--prompts", type=int, default=64, help="prompts per test split, for the samples")
    add("--gw_points", type=int, default=1024, help="points per side for fused Gromov-Wasserstein")
    add(
        "--neural",
        action="store_true",
        help="in the cell of the comparison, also fit the published neural map; meant for a GPU",
    )
    add("--steps", type=int, default=5000, help="steps of the neural map")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    which = cells(args.variants or variants_of(args.pairs), args.pairs)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = [draw(split, args.prompts, GROUP, 4) for split in (SEEN, *UNSEEN)]
    drawn = [text for texts, _ in parts for text in texts], torch.cat([(v * 255).round().byte() for _, v in parts])
    truth = np.concatenate([np.asarray(verify(videos, texts).alignment) for texts, videos in parts])
    kept = {}
    for seed in args.seeds:
        batches = None
        for variant in dict(which):
            name = f"{variant}-{seed}"
            file = args.output / f"{name}.json"
            if not file.is_file():
                batches = batches or sources(seed, drawn, args)
                counts = [count for own, count in which if own == variant]
                found = measure(args.encoders / name, batches, counts, truth, args)
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(name, file=sys.stderr, flush=True)
            kept[name] = json.loads(file.read_text(encoding="utf-8"))
    tables(kept, which, args.seeds)


if __name__ == "__main__":
    main()
