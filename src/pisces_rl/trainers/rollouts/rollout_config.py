"""Settings shared by all trainers that sample groups of videos and train on them."""

import warnings
from dataclasses import dataclass, field, fields
from typing import ClassVar

from ...estimate import Held
from ..base.config import VideoPolicyConfig


@dataclass
class RolloutConfig(VideoPolicyConfig):
    r"""Settings of `RolloutTrainer`, in addition to `transformers.TrainingArguments`.

    Batch sizes: every `steps_per_generation * num_iterations` micro-batches, one rollout of `generation_batch_size`
    videos is sampled, in groups of `num_generations` per prompt. Each optimizer step uses
    `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` videos on each process.
    """

    small_group: ClassVar[int] = 8  # warn about smaller groups

    # --- how a rollout is sampled ---
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Videos per pipeline call while sampling; lower it to save memory. Unset: all videos of this "
            "process's share of the rollout in one call."
        },
    )

    overlap_rewards: bool = field(
        default=False,
        metadata={
            "help": "Score one batch of rollout_batch_size videos while the next is sampled, in a separate thread and "
            "CUDA stream. Each reward is then called once per batch. Worthwhile if rewards take long."
        },
    )

    # --- groups and batches, as in GRPOConfig ---
    num_generations: int = field(
        default=8,
        metadata={
            "help": "Videos per prompt, which form a group (at least 2). Below 8, advantages on video often have the "
            "wrong sign."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Videos per rollout over all processes. Set this or steps_per_generation, not both. Unset: the "
            "videos of one optimizer step."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches that a rollout is split into. More than gradient_accumulation_steps gives several "
            "optimizer steps per rollout. Unset: gradient_accumulation_steps."
        },
    )
    num_iterations: int = field(
        default=1,
        metadata={
            "help": "Times that each rollout is trained on (mu in the GRPO paper). More save sampling time, but train "
            "on older samples."
        },
    )

    # --- advantages ---
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "What advantages are divided by: 'group', the standard deviation of the group's rewards; 'batch', "
            "that of the rollout; 'none', nothing."
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "How several rewards are combined: 'sum_then_normalize', or 'normalize_then_sum', which "
            "normalises each reward within its group first, so that rewards of different scales count alike."
        },
    )
    advantage_clip: float = field(
        default=5.0,
        metadata={
            "help": "Advantages are clamped to the range from -advantage_clip to advantage_clip. Lower it if outliers "
            "dominate the updates."
        },
    )
    per_prompt_stat_tracking: bool = field(
        default=False,
        metadata={
            "help": "Compute advantages from running statistics of each prompt's summed rewards (DDPO) instead of the "
            "group's. Requires the defaults of scale_rewards and multi_objective_aggregation."
        },
    )
    per_prompt_stat_tracking_buffer_size: int = field(
        default=16, metadata={"help": "Most recent rewards kept per prompt, with per_prompt_stat_tracking."}
    )
    per_prompt_stat_tracking_min_count: int = field(
        default=16,
        metadata={
            "help": "Rewards that a prompt needs before its statistics are used, with per_prompt_stat_tracking. Until "
            "then the statistics of the rollout are used."
        },
    )

    # --- evaluation and output files ---
    log_completions: bool = field(
        default=False,
        metadata={"help": "Also write the first num_sample_videos videos of a training rollout at each log."},
    )

    def __post_init__(self) -> None:
        names: dict[str | bool, str] = {True: "group", False: "none"}
        self.scale_rewards = names.get(self.scale_rewards, self.scale_rewards)
        super().__post_init__()
        self.check_choice("scale_rewards", ("group", "batch", "none"))
        self.check_choice("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum"))
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} must not exceed "
                f"per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size}."
            )
        if self.per_prompt_stat_tracking:
            self._check_scaling(
                "per_prompt_stat_tracking=True uses the mean and standard deviation of each prompt's summed rewards",
                "scale_rewards",
                "multi_objective_aggregation",
            )
        elif self.multi_objective_aggregation == "normalize_then_sum":
            self._check_scaling(
                "multi_objective_aggregation='normalize_then_sum' divides each reward by the standard deviation of "
                "its group and the sum by that of the batch",
                "scale_rewards",
            )
        if not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip={self.advantage_clip} must be positive: it bounds |advantage|.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} must be at least 1.")
        self._check_batches()

    def _check_scaling(self, why: str, *names: str) -> None:
        """Raise a ValueError if one of these settings, which have no effect, differs from the method's default."""
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
        """Count the clean latents of each video of a rollout; subclasses add to them."""
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
        """Raise a ValueError if a setting has none of the allowed values."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")

    def _check_batches(self) -> None:
        per_step = self.per_device_train_batch_size * self.data_parts
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation set the same thing; set only one.")
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
                f"rollout of {share} videos, so no sampling is left to overlap with: set rollout_batch_size "
                f"below {share}, or leave overlap_rewards out."
            )
        if self.num_generations < self.small_group:
            warnings.warn(
                f"num_generations={self.num_generations}: on video, groups below {self.small_group} often give "
                "advantages of the wrong sign. Training continues.",
                stacklevel=2,
            )

    def videos_a_step(self) -> str:
        """Describe in words how many videos one optimizer step, or several together, sample."""
        uses, accumulated = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        videos = self.generation_batch_size * max(1, accumulated // uses)
        steps = (
            f"every {uses / accumulated:g} optimizer steps sample"
            if uses > accumulated
            else ("each optimizer step samples")
        )
        return f"{steps} {videos} videos ({videos // self.num_generations} x {self.num_generations})"
