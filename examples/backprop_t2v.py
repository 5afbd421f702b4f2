"""Train a LoRA of any text-to-video pipeline of diffusers by reward backpropagation.

    accelerate launch examples/backprop_t2v.py
    accelerate launch examples/backprop_t2v.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dataset prompts.txt \
        --reward_encoder openai/clip-vit-large-patch14 --rewards cosine --height 240 --width 416 --num_frames 33 \
        --decode_frames 2 --output_dir outputs/wan

Rewards must be differentiable. Without --config and --model, the script uses recipes/shapemotion_backprop.yaml: the
built-in tiny-wan on ShapeMotion with label-free rewards of the built-in tiny-vtm, offline, on a CPU or GPU.
`pisces-rl train --method backprop` is equivalent.
"""

import sys
from pathlib import Path

from pisces_rl.cli.quiet import quiet
from pisces_rl.cli.train_command import train_by

RECIPE = Path(__file__).parents[1] / "recipes" / "shapemotion_backprop.yaml"

if __name__ == "__main__":
    quiet()
    train_by("backprop", sys.argv[1:], RECIPE)
