"""Train a LoRA of any text-to-video, image-to-video or text-to-image pipeline of diffusers by GRPO.

    accelerate launch examples/grpo_t2v.py --config recipes/shapemotion_grpo.yaml
    accelerate launch examples/grpo_t2v.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dataset prompts.txt \
        --rewards my_rewards.py:score --height 240 --width 416 --num_frames 33 --output_dir outputs/wan
    accelerate launch examples/grpo_t2v.py --model Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --dataset captions.jsonl \
        --rewards my_rewards.py:score --height 480 --width 832 --num_frames 33 --output_dir outputs/wan-i2v
    accelerate launch examples/grpo_t2v.py --continue_from outputs/shapemotion_labelfree --output_dir outputs/further

The third command trains image-to-video: each line of captions.jsonl is {"prompt": ..., "image": a file in the same
folder}. The last one continues from a saved adapter.
Without --config and --model, the script uses recipes/shapemotion_labelfree.yaml: the built-in tiny-wan on ShapeMotion
with label-free rewards of the built-in tiny-vtm, offline, on a CPU or GPU. `pisces-rl train --method grpo` is
equivalent, except for the default recipe.
"""

import sys
from pathlib import Path

from pisces_rl.cli.quiet import quiet
from pisces_rl.cli.train_command import train_by

RECIPE = Path(__file__).parents[1] / "recipes" / "shapemotion_labelfree.yaml"

if __name__ == "__main__":
    quiet()
    train_by("grpo", sys.argv[1:], RECIPE)
