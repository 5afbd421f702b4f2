"""Print the verifier's scores of clips with a single corruption, as a Markdown table.

python benchmarks/shapemotion_corruptions.py [--num_scenes 300] [--seed 5]
"""

import argparse

import numpy as np

from pisces_rl.shapemotion import (
    FAMILIES,
    QUALITY,
    SCENE_CORRUPTIONS,
    VIDEO_CORRUPTIONS,
    corrupt,
    render,
    sample_scenes,
    verify,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num_scenes", type=int, default=300, help="Scenes of the train split, drawn uniformly from all families."
    )
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()

    each = -(-args.num_scenes // len(FAMILIES))
    scenes = [s for i, f in enumerate(FAMILIES) for s in sample_scenes(each, "train", args.seed + i, f)]
    titles = ("corruption", "n", "correct", "alignment", "quality", *QUALITY, "alignment dimensions below .9")
    print(f"| {' | '.join(titles)} |")
    print("|" + "---|" * (6 + len(QUALITY)))
    for name in ["clean", *SCENE_CORRUPTIONS, *VIDEO_CORRUPTIONS]:
        if name == "clean":
            rows, videos = list(range(len(scenes))), render(scenes, args.seed)
        else:
            rows, videos = corrupt(name, scenes, args.seed)
        result = verify(videos, [scenes[i].prompt() for i in rows])
        means = result.summary()
        cells = [f"{means[key]:.2f}" for key in ("correct", "alignment", "quality", *QUALITY)]
        dimensions = {k: np.nanmean(v) for k, v in result.alignment_dimensions.items() if not np.isnan(v).all()}
        low = ", ".join(f"{k} {v:.2f}" for k, v in sorted(dimensions.items(), key=lambda x: x[1]) if v < 0.9)
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} | {low} |", flush=True)


if __name__ == "__main__":
    main()
