r"""Estimate a recipe's memory per GPU, without weights, a GPU or a model download.

    python examples/estimate_memory.py --config recipes/wan21_1.3b_grpo.yaml
    python examples/estimate_memory.py --config recipes/wan21_14b_grpo.yaml --gpu_gib 40 --sharding fsdp2 \
        --num_processes 8
    python examples/estimate_memory.py --method backprop --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 240 \
        --width 416 --num_frames 33 --decode_frames 2
    python examples/estimate_memory.py --table              # every recipe of recipes/architectures.json

--method takes the methods of train_t2v.py (default grpo); other arguments are those of training. Models in
recipes/architectures.json are built from that file; for any other folder or Hub id, the configuration files are read.
bf16 is on, as on a GPU, unless you pass --bf16 false. `pisces-rl estimate` is equivalent.
"""

import sys

from pisces_rl.cli.estimate_command import main
from pisces_rl.cli.quiet import quiet

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
