"""`pisces-rl train`: train a LoRA or all weights of any text-to-video, image-to-video or text-to-image pipeline of
diffusers, by any method.

--method, or the recipe's `method`, selects the settings. Flow-DPO can learn from pairs without rewards: each line of
the `.jsonl` file is {"prompt": ..., "chosen": a video file in the same folder, "rejected": another}. It then ignores a
recipe's rewards and rollout settings and refuses --rewards. Other methods ignore these columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from pisces_rl.trainers import METHODS, RewardBackpropConfig, RewardBackpropTrainer, VideoPolicyTrainer
from pisces_rl.trainers.base.data.pairs import SIDES
from pisces_rl.trainers.forward.flow_dpo import OF_ROLLOUTS

from . import RECIPES, usage_error
from .arguments import DEFAULT_METHOD, method_of, parse_arguments, unread_settings
from .training_inputs import ScriptArguments, load_auxiliary_losses, load_datasets, load_rewards, lora_config

#: Every trainer and its config class, by name: the methods that train on rollouts, and reward backpropagation.
TRAINERS = METHODS | {"backprop": (RewardBackpropTrainer, RewardBackpropConfig)}


@dataclass
class MethodArguments(ScriptArguments):
    method: str = field(
        default=DEFAULT_METHOD,
        metadata={"choices": list(TRAINERS), "help": "Training method; it selects the other settings."},
    )


def with_recipe(arguments: Sequence[str], recipe: Path, prog: str | None = None) -> list[str]:
    """Return the command line, with the default recipe added if it names neither a recipe nor a model."""
    given = {argument.split("=")[0] for argument in arguments}
    default = [] if given & {"--config", "--model", "-h", "--help"} else ["--config", str(recipe)]
    if default and not recipe.is_file():
        usage_error("give --config RECIPE or --model; only a source tree has the default recipes.", prog)
    return [*default, *arguments]


def fit_pairs(method: str, script: ScriptArguments, config, dataset: Dataset, arguments: Sequence[str]) -> None:
    """If Flow-DPO has pairs, drop a recipe's rewards and rollout settings; the trainer refuses any that the command
    line sets."""
    if method != "flow_dpo" or set(SIDES).isdisjoint(dataset.column_names):
        return
    asked = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments}
    if "rewards" not in asked:
        script.rewards = []
        for name in set(unread_settings(script, script.judges)) - asked:
            setattr(script, name, type(script).__dataclass_fields__[name].default)
    for name in set(OF_ROLLOUTS) - asked:
        setattr(config, name, type(config).__dataclass_fields__[name].default)


def train(method: str, script: ScriptArguments, config, arguments: Sequence[str] = ()) -> VideoPolicyTrainer:
    """Train and save the model.

    Args:
        method: one of `TRAINERS`.
        script: parsed from the command line.
        config: parsed from the command line, an instance of the method's config class.
        arguments: that command line, to distinguish a recipe's settings from the user's.
    """
    files = [*(config.image_columns or ["image"]), *(SIDES if method == "flow_dpo" else ())]
    train_dataset, eval_dataset = load_datasets(script, config.seed, files)
    fit_pairs(method, script, config, train_dataset, arguments)
    trainer = TRAINERS[method][0](
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
    return trainer


def train_by(method: str, arguments: Sequence[str], recipe: Path) -> None:
    """Train by a fixed method; the command line has no --method."""
    script, config = parse_arguments(ScriptArguments, TRAINERS[method][1], arguments=with_recipe(arguments, recipe))
    train(method, script, config, arguments)


def main(arguments: Sequence[str], prog: str | None = None) -> None:
    method = method_of(arguments, TRAINERS, prog=prog)
    given = with_recipe(arguments, RECIPES / f"shapemotion_{method}.yaml", prog)
    script, config = parse_arguments(MethodArguments, TRAINERS[method][1], arguments=given, prog=prog)
    train(method, script, config, arguments)
