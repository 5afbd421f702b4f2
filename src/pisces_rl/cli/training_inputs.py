"""Training's inputs from the command line: model, prompts, rewards, adapter and auxiliary losses."""

import functools
from dataclasses import dataclass, field

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from pisces_rl.ot.plans import SOLVERS, check_solver
from pisces_rl.policy import FULL, default_lora_config
from pisces_rl.shapemotion import Clips, load_prompts
from pisces_rl.trainers import AuxiliaryLoss, ConsistencyDistillation

from .arguments import load_prompt_dataset, load_reward_function, transport_options


@dataclass
class ScriptArguments:
    model: str = field(default="tiny-wan", metadata={"help": "Hub id or folder of a pipeline, or tiny-wan."})
    dataset: str = field(
        default="shapemotion", metadata={"help": "shapemotion, a Hub dataset, or a .txt, .csv, .json, .jsonl file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    dataset_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    eval_prompts: int = field(default=128, metadata={"help": "Held-out prompts per set; 0 turns evaluation off."})
    rewards: list[str] = field(
        default_factory=lambda: ["ot_quality", "matching"],
        metadata={
            "help": "Rewards to train on: known names (those in pisces_rl.rewards.REWARDS accept options, as in "
            "motion_flow?video_fps=8), file.py:function, package.module:function, a server's "
            "http://host:port/NAME or a vision-language judge's "
            "vlm+http://host:port/v1?model=ID."
        },
    )
    judges: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that are only evaluated, on the held-out prompts."}
    )
    reward_encoder: str = field(
        default="tiny-vtm", metadata={"help": "Encoder of the rewards ot_quality, ot_semantic, cosine and matching."}
    )
    ot_map: str | None = field(
        default=None,
        metadata={"help": "Folder written by pisces-rl fit-map, for ot_quality. Unset: the map of tiny-vtm."},
    )
    divergence_weight: float = field(
        default=0.0,
        metadata={"help": "Weight in ot_quality of the credit for the divergence to the bank saved with the map."},
    )
    ot_attention: str | None = field(
        default=None,
        metadata={"help": 'OTAttention settings for ot_semantic as JSON, for example {"plan": "partial"}.'},
    )
    ot_solver: str | None = field(
        default=None,
        metadata={"choices": list(SOLVERS), "help": "Solver of plans and of the divergence. Unset: native."},
    )
    reward_offload: str | None = field(
        default=None,
        metadata={
            "help": "Device the encoder runs on, such as cuda, while its weights stay on the CPU between calls."
        },
    )
    train: str = field(
        default="lora",
        metadata={
            "choices": ["lora", FULL],
            "help": "lora: train an adapter; full: train all denoiser weights in fp32, which needs a lower "
            "--learning_rate and ignores --lora_r and the other LoRA settings.",
        },
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the adapter. Unset: 16, or the rank of --continue_from."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter. Unset: the rank."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt. Unset: attention and feed-forward projections."}
    )
    consistency_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of consistency distillation on captioned videos, added to the rewards' loss."},
    )
    consistency_steps: int = field(
        default=16, metadata={"help": "Number of steps of the schedule whose ODE is distilled."}
    )
    consistency_guidance: float | None = field(
        default=None,
        metadata={"help": "guidance_scale of that ODE, which distills the guidance too. Unset: the policy's."},
    )
    consistency_decay: float = field(
        default=0.95, metadata={"help": "Decay of the adapter's moving average, which computes the targets."}
    )
    consistency_batch_size: int | None = field(
        default=None, metadata={"help": "Videos per micro-batch. Unset: per_device_train_batch_size."}
    )


def load_datasets(
    script: ScriptArguments, seed: int, images: list[str] | None = None
) -> tuple[Dataset, dict[str, Dataset] | None]:
    """Load the training prompts, with images from the columns `images`, and the held-out sets."""
    count = script.eval_prompts
    if script.dataset == "shapemotion":
        train = load_prompts("train", n=2048, seed=seed)
        if not count:
            return train, None
        half = max(1, count // 2)
        halves = [shapemotion_prompts(s, half, seed=1) for s in ("test_color_shape", "test_shape_motion")]
        return train, {
            "test_seen": shapemotion_prompts("test_seen", count, seed=1),  # fresh prompts of trained compositions
            "held_out": concatenate_datasets(halves),  # color-shape and shape-motion pairs that are never trained
            "relation": shapemotion_prompts("test_seen", max(1, count // 8), seed=1, directed=True),
        }
    images = images or ["image"]
    prompts = load_prompt_dataset(script.dataset, script.dataset_split, script.dataset_column, images)
    if not count or len(prompts) < 2 * count:
        if count:
            print(f"No evaluation: {len(prompts)} prompts are too few to hold out {count}; lower --eval_prompts.")
        return prompts, None
    parts = prompts.train_test_split(test_size=count, seed=seed)
    return parts["train"], {"held_out": parts["test"]}


def shapemotion_prompts(split: str, count: int, seed: int, directed: bool = False) -> Dataset:
    """Return ShapeMotion prompts without a directed relation ("above", "to the left of"), or only prompts with one.

    tiny-wan knows the axis of a relation but not the order of its objects, so these prompts are evaluated separately.
    """
    prompts = load_prompts(split, n=8 * count + 64, seed=seed)
    keep = [row for row, relation in enumerate(prompts["relation"]) if (relation not in (None, "and")) == directed]
    return prompts.select(keep[:count])


def load_rewards(script: ScriptArguments, names: list[str], device: torch.device | None = None) -> list:
    if script.ot_solver is not None:
        check_solver(script.ot_solver)
    options = transport_options(script, [*names, *script.rewards, *script.judges])
    load = functools.partial(
        load_reward_function, encoder=script.reward_encoder, offload=script.reward_offload, device=device
    )
    return [load(name, **options[name]) for name in names]


def lora_config(script: ScriptArguments, config) -> LoraConfig | str | None:
    """Return the adapter's settings, None to use those of the saved adapter in continue_from, or "full"."""
    given = script.lora_r, script.lora_alpha, script.lora_target_modules
    if script.train == FULL:
        return FULL
    if config.continue_from and given == (None, None, None):
        return None
    return default_lora_config(16 if script.lora_r is None else script.lora_r, *given[1:])


def load_auxiliary_losses(script: ScriptArguments, config, train_dataset: Dataset) -> list[AuxiliaryLoss]:
    """Return consistency distillation if its weight is set, on ShapeMotion's clips or the videos in column `video`."""

    if not script.consistency_weight:
        return []
    videos = train_dataset
    if script.dataset == "shapemotion":
        videos = Clips("train", n=4096, seed=config.seed)
    elif "video" not in train_dataset.column_names:
        raise ValueError(f"dataset={script.dataset!r} has no column `video`, which --consistency_weight needs.")
    return [
        ConsistencyDistillation(
            videos,
            script.consistency_weight,
            steps=script.consistency_steps,
            guidance=script.consistency_guidance,
            decay=script.consistency_decay,
            batch_size=script.consistency_batch_size,
        )
    ]
