"""Fit the maps of the quality reward for the study's cells map_*, *_quality and *_both, on tiny-vtm's features.

    python benchmarks/study/maps.py                     # into outputs/study/maps/; the neural map is meant for a GPU
    python benchmarks/study/maps.py --only linear entropic

The source is the captions of ShapeMotion's train split, the target their clips. The script prints the divergence and
the paired recall@1 on unseen clips of the split. The neural map has the published network and settings.
"""

import argparse
from pathlib import Path

import torch

from pisces_rl.ot.divergence import BankDivergence
from pisces_rl.ot.maps import EntropicMap, LinearMap, MeanShiftMap, NeuralMap
from pisces_rl.ot.metrics import default_blur, paired_recall
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.shapemotion import render_layout, sample_layouts

ENCODER = "tiny-vtm"
MAPS = {"mean_shift": MeanShiftMap, "linear": LinearMap, "entropic": EntropicMap, "neural": NeuralMap}


@torch.no_grad()
def features(encoder, count: int, seed: int, batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, D) of captions and of their clips."""
    generator = torch.Generator().manual_seed(seed)
    texts, videos = [], []
    for first in range(0, count, batch):
        specs, layout = sample_layouts(min(batch, count - first), "train", generator=generator)
        texts.append(encoder.encode_text([scene.prompt() for scene in specs.scenes()]).pooled)
        videos.append(encoder.encode_video(render_layout(layout, size=64)).pooled)
    return torch.cat(texts).float().cpu(), torch.cat(videos).float().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MAPS), choices=list(MAPS))
    parser.add_argument("--clips", type=int, default=8192, help="to fit on")
    parser.add_argument("--steps", type=int, default=5000, help="of the neural map")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study/maps"))
    args = parser.parse_args()
    encoder = load_encoder(ENCODER)
    text, video = features(encoder, args.clips, seed=0)
    unseen_text, unseen_video = features(encoder, 1024, seed=1)
    bank = BankDivergence(unseen_video, blur=default_blur(unseen_video))
    print("| map | divergence | recall@1 |\n|---|---|---|")
    for name in args.only:
        options = {"steps": args.steps, "patience": 10**6} if name == "neural" else {}
        map_ = MAPS[name](encoder=encoder.name, **options).fit(text, video)
        map_.save(args.output_dir / name)
        with torch.no_grad():
            image = map_(unseen_text)
        recall = paired_recall(image, unseen_video)[1].value
        print(f"| {name} | {float(bank(image)):.4f} | {recall:.3f} |", flush=True)


if __name__ == "__main__":
    main()
