"""Fit a transport map from text embeddings to embeddings of real videos, for the quality reward.

    python examples/fit_ot_map.py                              # ShapeMotion for tiny-vtm, a minute on two cores
    accelerate launch examples/fit_ot_map.py --encoder ./internvideo2 --dataset clips.jsonl --output_dir outputs/map \
        --maps entropic neural

A data set has the columns `video` (in a file a path, beside it or absolute; else the videos themselves) and `caption`;
rows with only one of them make it unpaired. Features are cached in output_dir/features, so a call that was broken off
goes on where it was, and a larger max_samples adds to them; each GPU decodes and encodes its share. Every map is
scored on pairs that it was not fitted on; the best one, or the kind that --save names, is saved in output_dir, with a
bank of real videos' features for the divergence:

    load_reward("ot_quality", encoder="./internvideo2", ot_map="outputs/map")

`pisces-rl fit-map` is the same.
"""

import sys

from pisces_rl.cli.fit_map_command import main
from pisces_rl.cli.quiet import quiet

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
