"""Configuration that all trainers share which sample groups of videos and train on them."""

import warnings
from dataclasses import dataclass, field, fields
from typing import ClassVar

from ...estimate import Held
from ..base.config import VideoPolicyConfig


@dataclass
class RolloutConfig(VideoPolicyConfig):
    r"""Settings of `RolloutTrainer`, on top of `transformers.TrainingArguments`.

    How much is sampled and updated: every `steps_per_generation * num_iterations` micro-batches one rollout of
    `generation_batch_size` videos is drawn, in groups of `num_generations` per prompt; each optimizer step uses
    `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` videos on each process.
    """

    small_group: ClassVar[int] = 8  # below, a warning

    # --- how a rollout is sampled ---
    rollout_batch_size: int | None = field(
        default=None,
        metadata={"help": "Videos per call of the pipeline while sampling. Unset: the process's whole share."},
    )

    overlap_rewards: bool = field(
        default=False,
        metadata={
            "help": "Whether rewards score one rollout_batch_size of videos while the next is sampled, in a "
            "thread and on a CUDA stream of their own. They are then called once for each such batch."
        },
    )

    # --- groups and batches, as in GRPOConfig ---
    num_generations: int = field(
        default=8,
        metadata={
            "help": "Videos per prompt in a group (at least 2; below 8 the "
            "sign of advantages is often wrong on video)."
        },
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Videos of a rollout over all processes. Unset: the effective batch size."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a rollout is split into. Unset: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "How often each rollout is used (mu in the algorithm)."})

    # --- advantages ---
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "'group' or 'batch': advantages are divided by that standard deviation; 'none': by nothing."
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={"help": "'sum_then_normalize' or 'normalize_then_sum' (each reward normalised in its group first)."},
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clamped to +- this value."})
    per_prompt_stat_tracking: bool = field(
        default=False,
        metadata={
            "help": "Advantages from running statistics of each prompt's summed rewards (DDPO) instead of the "
            "group's; not with other scale_rewards or multi_objective_aggregation."
        },
    )
    per_prompt_stat_tracking_buffer_size: int = field(default=16, metadata={"help": "Rewards kept per prompt."})
    per_prompt_stat_tracking_min_count: int = field(
        default=16, metadata={"help": "Rewards a prompt needs before its own statistics are used."}
    )

    # --- evaluation and what a run leaves ---
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to write the first videos of a training rollout at each log, too."}
    )

    def __post_init__(self):
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        super().__post_init__()
        self.check_choice("scale_rewards", ("group", "batch", "none"))
        self.check_choice("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum"))
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} is more than "
                f"per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size} keeps."
            )
        if self.per_prompt_stat_tracking:
            self._check_scaling(
                "per_prompt_stat_tracking=True takes the mean and standard deviation of each prompt's summed rewards",
                "scale_rewards",
                "multi_objective_aggregation",
            )
        elif self.multi_objective_aggregation == "normalize_then_sum":
            self._check_scaling(
                "multi_objective_aggregation='normalize_then_sum' divides each reward by its group's "
                "standard deviation and their sum by the batch's",
                "scale_rewards",
            )
        if not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip={self.advantage_clip} must be positive: advantages lie within +- it.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} must be at least 1.")
        self._check_batches()

    def _check_scaling(self, why: str, *names: str) -> None:
        """A ValueError where one of these settings is not the method's default, although it has no effect."""
        for name in names:
            default, value = self.__dataclass_fields__[name].default, getattr(self, name)
            if value != default:
                raise ValueError(
                    f"{why}, so {name}={value!r} would have no effect; set {name}={default!r}, or "
                    f"leave {why.partition('=')[0]} out."
                )

    @property
    def reuses_rollouts(self) -> bool:
        """Whether a rollout serves several optimizer steps."""
        return self.steps_per_generation * self.num_iterations > self.gradient_accumulation_steps

    def objective(self) -> tuple[str, ...]:
        shared = {f.name for f in fields(RolloutConfig)}
        own = [f.name for f in fields(self) if f.name not in shared]
        return "scale_rewards", "multi_objective_aggregation", "advantage_clip", *own

    def held(self) -> Held:
        """Of each video of a rollout its clean latents are kept; a subclass adds to that."""
        videos = self.per_device_train_batch_size * self.steps_per_generation
        return Held(
            sampled=min(self.rollout_batch_size or videos, videos),
            trained=self.per_device_train_batch_size,
            prompts=max(1, videos // self.num_generations),
            uses=self.steps_per_generation * self.num_iterations,
            rollout=videos,
            latents=1,
        )

    def check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """A ValueError where a setting is none of the allowed ones."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")

    def _check_batches(self) -> None:
        per_step = self.per_device_train_batch_size * self.data_parts
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation say the same thing; give one of them.")
        if self.generation_batch_size is not None:
            if self.generation_batch_size % per_step:
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of "
                    f"per_device_train_batch_size * processes = {per_step}."
                )
            self.steps_per_generation = self.generation_batch_size // per_step
        else:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = per_step * self.steps_per_generation
        if self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations}: advantages need at least 2 videos per prompt.")
        if self.generation_batch_size % self.num_generations:
            divisors = [n for n in range(2, self.generation_batch_size + 1) if self.generation_batch_size % n == 0]
            raise ValueError(
                f"a rollout of {self.generation_batch_size} videos (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} * steps_per_generation {self.steps_per_generation} * "
                f"{self.data_parts} processes) cannot be divided into groups of num_generations="
                f"{self.num_generations}; choose num_generations among {divisors}, or change the batch size."
            )
        if self.steps_per_generation % self.gradient_accumulation_steps and (
            self.gradient_accumulation_steps % self.steps_per_generation
        ):
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: one must divide the other."
            )
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ValueError(f"rollout_batch_size={self.rollout_batch_size} must be at least 1, or unset.")
        share = self.per_device_train_batch_size * self.steps_per_generation
        if self.overlap_rewards and not (self.rollout_batch_size and self.rollout_batch_size < share):
            raise ValueError(
                f"overlap_rewards=True, but rollout_batch_size={self.rollout_batch_size} does not split a process's "
                f"rollout of {share} videos, so there is no sampling left to score beside: set rollout_batch_size "
                f"below {share}, or leave overlap_rewards out."
            )
        if self.num_generations < self.small_group:
            warnings.warn(
                f"num_generations={self.num_generations}: groups below {self.small_group} often give advantages "
                "of the wrong sign on video; training goes on.",
                stacklevel=2,
            )

    def videos_a_step(self) -> str:
        """How many videos an optimizer step samples, or several together do, in words."""
        uses, accumulated = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        videos = self.generation_batch_size * max(1, accumulated // uses)
        steps = (
            f"every {uses / accumulated:g} optimizer steps sample"
            if uses > accumulated
            else ("each optimizer step samples")
        )
        return f"{steps} {videos} videos ({videos // self.num_generations} x {self.num_generations})"
