"""Train a LoRA of any text-to-video, image-to-video or text-to-image pipeline of diffusers by any method.

    accelerate launch examples/train_t2v.py --method nft --config recipes/shapemotion_nft.yaml
    accelerate launch examples/train_t2v.py --method awm --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --dataset prompts.txt --rewards my_rewards.py:score --height 240 --width 416 --output_dir outputs/wan
    accelerate launch examples/train_t2v.py --method flow_dpo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --dataset pairs.jsonl --num_generations 2 --per_device_train_batch_size 4 --output_dir outputs/pairs

--method is grpo, flash_grpo, flow_dppo, nft, awm, rvm, flow_dpo or backprop, and selects the settings (--method nft
--help); other arguments are those of grpo_t2v.py. A recipe may name the method. Flow-DPO can learn from pairs without
rewards: each line of pairs.jsonl is {"prompt": ..., "chosen": a video file in the same folder, "rejected": another}.
It then ignores a recipe's rewards and rollout settings and refuses --rewards. Other methods ignore these columns.
Without --config and --model, the script uses recipes/shapemotion_METHOD.yaml (METHOD is rvm by default): the built-in
tiny-wan on ShapeMotion. `pisces-rl train` is equivalent.
"""

import sys

from pisces_rl.cli.quiet import quiet
from pisces_rl.cli.train_command import main

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
