"""Any method of pisces_rl on a LoRA of any text-to-video, image-to-video or text-to-image pipeline of diffusers.

    accelerate launch examples/train_t2v.py --method nft --config recipes/shapemotion_nft.yaml
    accelerate launch examples/train_t2v.py --method awm --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --dataset prompts.txt --rewards my_rewards.py:score --height 240 --width 416 --output_dir outputs/wan
    accelerate launch examples/train_t2v.py --method flow_dpo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --dataset pairs.jsonl --num_generations 2 --per_device_train_batch_size 4 --output_dir outputs/pairs

--method is grpo, flash_grpo, flow_dppo, nft, awm, rvm or flow_dpo, and decides which settings there are (--method nft
--help); other arguments are those of grpo_t2v.py. A recipe may name the method. Each line of pairs.jsonl is
{"prompt": ..., "chosen": a video file beside it, "rejected": another}: Flow-DPO then learns from these pairs, without
rewards; those of a recipe are not loaded, its settings of rollouts do not count, and --rewards is refused. To other
methods these columns mean nothing.
Without --config and --model it follows recipes/shapemotion_METHOD.yaml (of rvm, if no method is named): the
embedded tiny-wan on ShapeMotion.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset
from grpo_t2v import ScriptArguments, arguments, load_auxiliary_losses, load_datasets, load_rewards, lora_config

from pisces_rl import METHODS
from pisces_rl.cli import parse_arguments
from pisces_rl.trainers.base.data.pairs import SIDES
from pisces_rl.trainers.forward.flow_dpo import OF_ROLLOUTS

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class MethodArguments(ScriptArguments):
    method: str = field(default="rvm", metadata={"help": f"One of {', '.join(METHODS)}."})


def method_of(argv: list[str], methods: Iterable[str] = METHODS, unnamed: str | None = None) -> str:
    """The method that the command line or its recipe names; it decides which settings there are.

    Args: unnamed: what a recipe is for that names none; None refuses it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--config", type=Path)
    known = parser.parse_known_args(argv)[0]
    method = known.method
    if method is None and known.config is not None and known.config.is_file():
        method = (yaml.safe_load(known.config.read_text(encoding="utf-8")) or {}).get("method", unnamed)
        if method is None:
            raise SystemExit(f"{known.config} names no method; add --method, one of {', '.join(methods)}.")
    method = method or unnamed or MethodArguments.method
    if method not in methods:
        raise SystemExit(f"--method {method!r} must be one of {', '.join(methods)}.")
    return method


def fit_pairs(method: str, script: ScriptArguments, config, dataset: Dataset) -> None:
    """Where Flow-DPO has pairs, leave out a recipe's rewards and settings of rollouts; the trainer refuses what the
    command line asks for of these."""
    if method != "flow_dpo" or set(SIDES).isdisjoint(dataset.column_names):
        return
    asked = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in sys.argv[1:]}
    if "rewards" not in asked:
        script.rewards = []
    for name in set(OF_ROLLOUTS) - asked:
        setattr(config, name, type(config).__dataclass_fields__[name].default)


def main() -> None:
    method = method_of(sys.argv[1:])
    make_trainer, make_config = METHODS[method]
    given = arguments(RECIPES / f"shapemotion_{method}.yaml")
    script, config = parse_arguments(MethodArguments, make_config, arguments=given)
    files = [*(config.image_columns or ["image"]), *(SIDES if method == "flow_dpo" else ())]
    train_dataset, eval_dataset = load_datasets(script, config.seed, files)
    fit_pairs(method, script, config, train_dataset)
    trainer = make_trainer(
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
