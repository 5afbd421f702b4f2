"""Fit a transport map from text embeddings to embeddings of real videos, for the quality reward.

    python examples/fit_ot_map.py                              # ShapeMotion for tiny-vtm, a minute on two cores
    accelerate launch examples/fit_ot_map.py --encoder ./internvideo2 --dataset clips.jsonl --output_dir outputs/map \
        --maps entropic neural

A dataset needs the columns `video` and `caption`. In a .csv or .json file, `video` is a path, absolute or relative to
the file; in other datasets, it holds the videos. Rows with only one of the two make the dataset unpaired. Features
are cached in output_dir/features: an interrupted call resumes there, and a larger max_samples adds to them. Each GPU
decodes and encodes its share. Every map is scored on held-out pairs. The map that it recommends, or the kind that
--save names, is saved in output_dir with a bank of real-video features for the divergence:

    load_reward("ot_quality", encoder="./internvideo2", ot_map="outputs/map")

`pisces-rl fit-map` is equivalent.
"""

import sys

from pisces_rl.cli.fit_map_command import main
from pisces_rl.cli.quiet import quiet

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
