r"""Memory of a recipe on each GPU, without weights, without a GPU and without downloading a model.

    python examples/estimate_memory.py --config recipes/wan21_1.3b_grpo.yaml
    python examples/estimate_memory.py --config recipes/wan21_14b_grpo.yaml --gpu_gib 40 --sharding fsdp2 \
        --num_processes 8
    python examples/estimate_memory.py --method backprop --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 240 \
        --width 416 --num_frames 33 --decode_frames 2
    python examples/estimate_memory.py --table              # every recipe of recipes/architectures.json

--method is one of train_t2v.py's, where nothing names one grpo; other arguments are those of the script that trains by
it. A model of recipes/architectures.json is built from there; of any other one, a folder or a Hub id, the
configuration files are read. bf16 is on, as on a GPU, unless --bf16 false. `pisces-rl estimate` is the same.
"""

import sys

from pisces_rl.cli.estimate_command import main
from pisces_rl.cli.quiet import quiet

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
