"""Reward backpropagation on a LoRA of any text-to-video pipeline of diffusers.

    accelerate launch examples/backprop_t2v.py
    accelerate launch examples/backprop_t2v.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dataset prompts.txt \
        --reward_encoder openai/clip-vit-large-patch14 --rewards cosine --height 240 --width 416 --num_frames 33 \
        --decode_frames 2 --output_dir outputs/wan

Without --config and --model it follows recipes/shapemotion_backprop.yaml: the embedded tiny-wan on ShapeMotion and the
optimal-transport rewards of the embedded tiny-vtm; offline, on a CPU or a GPU. Rewards must be differentiable.
"""

from pathlib import Path

from grpo_t2v import (
    ScriptArguments,
    arguments,
    load_auxiliary_losses,
    load_datasets,
    load_rewards,
    lora_config,
)

from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer
from pisces_rl.cli import parse_arguments

RECIPE = Path(__file__).parents[1] / "recipes" / "shapemotion_backprop.yaml"


def main() -> None:
    script, config = parse_arguments(ScriptArguments, RewardBackpropConfig, arguments=arguments(RECIPE))
    train_dataset, eval_dataset = load_datasets(script, config.seed, config.image_columns)
    trainer = RewardBackpropTrainer(
        model=script.model,
        reward_funcs=load_rewards(script, script.rewards, config.own_reward_device()),
        judge_funcs=load_rewards(script, script.judges, config.own_reward_device()),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=lora_config(script, config),
        auxiliary_losses=load_auxiliary_losses(script, config, train_dataset),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
