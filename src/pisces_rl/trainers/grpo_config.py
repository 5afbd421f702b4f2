"""Configuration of `VideoGRPOTrainer`."""

import warnings
from dataclasses import dataclass, field

from .config import VideoPolicyConfig


@dataclass
class VideoGRPOConfig(VideoPolicyConfig):
    r"""Settings of [`VideoGRPOTrainer`], on top of `transformers.TrainingArguments`.

    Names and defaults are those of `trl.GRPOConfig` where they mean the same. Deliberate differences: `epsilon`
    (per-step Gaussian log-ratios are small next to a token's), `learning_rate` (an adapter, not a language model),
    `bf16` only where CUDA supports it, `logging_steps=1`, `report_to="tensorboard"` (videos go there), and
    `eval_on_start=True` (the "before" of the report), `logging_nan_inf_filter=False` (it waits for the device after
    every micro-batch). There is no `loss_type`: all videos have as many steps.

    How much is sampled and updated: every `steps_per_generation * num_iterations` micro-batches one rollout of
    `generation_batch_size` videos is drawn, in groups of `num_generations` per prompt; each optimizer step uses
    `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` videos on each process.
    """

    # --- the policy: how a video is sampled ---
    transition: str | None = field(
        default=None,
        metadata={"help": "Transition kernel: flow_sde, flow_sde_linear, dance_sde or cps for flow matching, ddim for "
                  "epsilon- and v-prediction, ancestral for EDM. Unset: the first that fits the scheduler."},
    )
    noise_level: float | None = field(
        default=None,
        metadata={"help": "Noise of the transition (a, or eta). Unset: the value of the kernel's authors."},
    )
    sde_window_size: int | None = field(
        default=None,
        metadata={"help": "Consecutive denoising steps that are stochastic and trained; the others are ODE steps. The "
                  "window is common to a rollout. Unset: all steps but the last."},
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={"help": "Two integers low high: windows lie in the steps [low, high). Unset: all but the last."},
    )
    share_initial_noise: bool = field(
        default=False,
        metadata={"help": "Whether the videos of a group start from the same noise, so that only the transitions' "
                  "noise tells them apart."},
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={"help": "Videos per call of the pipeline while sampling. Unset: the process's whole share."},
    )

    overlap_rewards: bool = field(
        default=False,
        metadata={"help": "Whether rewards score one rollout_batch_size of videos while the next is sampled, in a "
                  "thread and on a CUDA stream of their own. They are then called once for each such batch."},
    )

    # --- groups and batches, as in GRPOConfig ---
    num_generations: int = field(default=8, metadata={"help": "Videos per prompt in a group (at least 2; below 8 the "
                                                      "sign of advantages is often wrong on video)."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Videos of a rollout over all processes. Unset: the effective batch size."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a rollout is split into. Unset: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "How often each rollout is used (mu in the algorithm)."})

    # --- the objective ---
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference (the adapter switched off); "
                                               "0 skips the reference pass."})
    kl_space: str = field(
        default="x",
        metadata={"help": "'x': KL of the transitions, |m - m_ref|^2 / 2 std^2; 'v': |v - v_ref|^2 of the "
                  "predictions, the better one when training without guidance."},
    )
    epsilon: float = field(default=1e-3, metadata={"help": "Lower clip range of the per-step ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. Unset: epsilon."})
    scale_rewards: str = field(
        default="group",
        metadata={"help": "'group' or 'batch': advantages are divided by that standard deviation; 'none': by "
                  "nothing."},
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={"help": "'sum_then_normalize' or 'normalize_then_sum' (each reward normalised in its group first)."},
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clamped to +- this value."})
    step_weighting: str = field(
        default="none",
        metadata={"help": "Weights across denoising steps: 'none', 'guard' (GRPO-Guard: normalised ratios, 1/dt) or "
                  "'longcat' (cancels the sensitivity of a step to the prediction)."},
    )
    per_prompt_stat_tracking: bool = field(
        default=False,
        metadata={"help": "Advantages from running statistics of each prompt's summed rewards (DDPO) instead of the "
                  "group's; not with other scale_rewards or multi_objective_aggregation."},
    )
    per_prompt_stat_tracking_buffer_size: int = field(default=16, metadata={"help": "Rewards kept per prompt."})
    per_prompt_stat_tracking_min_count: int = field(
        default=16, metadata={"help": "Rewards a prompt needs before its own statistics are used."}
    )
    replay_tolerance: float = field(
        default=1e-3,
        metadata={"help": "Training stops when |log p(update) - log p(sampling)| exceeds this before the first "
                  "optimizer step on a rollout: rollout and update must be the same computation."},
    )

    # --- evaluation and what a run leaves ---
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to write the first videos of a training rollout at each log, too."}
    )

    # --- TrainingArguments with other defaults ---

    def __post_init__(self):
        super().__post_init__()
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        self._check_choices()
        self._check_batches()

    def _check_choices(self) -> None:
        for name, allowed in (
            ("scale_rewards", ("group", "batch", "none")),
            ("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum")),
            ("kl_space", ("x", "v")),
            ("step_weighting", ("none", "guard", "longcat")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ValueError(f"epsilon={self.epsilon} and epsilon_high={self.epsilon_high} must be positive.")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative: it weights the KL term; 0 leaves it out.")
        if self.sde_window_range is not None and len(self.sde_window_range) != 2:
            raise ValueError(f"sde_window_range={self.sde_window_range} must be two integers, low and high.")
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} is more than "
                f"per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size} keeps."
            )
        for name, only in (("scale_rewards", "group"), ("multi_objective_aggregation", "sum_then_normalize")):
            if self.per_prompt_stat_tracking and getattr(self, name) != only:
                raise ValueError(
                    "per_prompt_stat_tracking=True takes the mean and standard deviation of each prompt's summed "
                    f"rewards, so {name}={getattr(self, name)!r} would have no effect; leave it {only!r}, or leave "
                    "per_prompt_stat_tracking out."
                )
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} must be at least 1.")

    def _check_steps(self, steps: int) -> None:
        super()._check_steps(steps)
        if steps < 2:
            raise ValueError(
                f"num_inference_steps={steps}: GRPO needs at least 2 steps, the last is deterministic; "
                "RewardBackpropTrainer takes 1."
            )

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
        if self.num_generations < 8:
            warnings.warn(
                f"num_generations={self.num_generations}: groups below 8 often give advantages of the wrong sign on "
                "video; training goes on.", stacklevel=2,
            )

    def uses_reference(self) -> bool:
        return super().uses_reference() or self.beta > 0

    def videos_a_step(self) -> str:
        """How many videos an optimizer step samples, or several together do, in words."""
        uses, accumulated = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        videos = self.generation_batch_size * max(1, accumulated // uses)
        steps = f"every {uses / accumulated:g} optimizer steps sample" if uses > accumulated else (
            "each optimizer step samples")
        return f"{steps} {videos} videos ({videos // self.num_generations} x {self.num_generations})"

    def policy_settings(self) -> dict:
        names = ("transition", "noise_level", "sde_window_size", "sde_window_range")
        return super().policy_settings() | {name: getattr(self, name) for name in names}
