"""Configuration of `VideoGRPOTrainer`."""

import json
import warnings
from dataclasses import dataclass, field

import torch

from ._trl import _BaseConfig


@dataclass
class VideoGRPOConfig(_BaseConfig):
    r"""Settings of [`VideoGRPOTrainer`], on top of `transformers.TrainingArguments`.

    Names and defaults are those of `trl.GRPOConfig` where they mean the same. Deliberate differences: `epsilon`
    (per-step Gaussian log-ratios are small next to a token's), `learning_rate` (an adapter, not a language model),
    `bf16` only where CUDA supports it, `logging_steps=1`, `report_to="tensorboard"` (videos go there), and
    `eval_on_start=True` (the "before" of the report). There is no `loss_type`: all videos have as many steps.

    How much is sampled and updated: every `steps_per_generation * num_iterations` micro-batches one rollout of
    `generation_batch_size` videos is drawn, in groups of `num_generations` per prompt; each optimizer step uses
    `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` videos on each process.
    """

    # --- the policy: how a video is sampled ---
    transition: str | None = field(
        default=None,
        metadata={"help": "Transition kernel: flow_sde, flow_sde_linear, dance_sde or cps for flow matching, ddim for "
                  "epsilon- and v-prediction. Unset: flow_sde or ddim, by the pipeline's scheduler."},
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
    num_inference_steps: int = field(default=16, metadata={"help": "Denoising steps of a sample."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance scale. Unset: the pipeline's default."}
    )
    height: int | None = field(default=None, metadata={"help": "Pixels. Unset: the pipeline's default."})
    width: int | None = field(default=None, metadata={"help": "Pixels. Unset: the pipeline's default."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames. Unset: the pipeline's default."})
    pipeline_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the pipeline's call as a dict or JSON, for instance "
                  "{\"max_sequence_length\": 226, \"negative_prompt\": \"blurry\"}."},
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
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the training prompts."})

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
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward. Unset: 1 each."}
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
        metadata={"help": "Advantages from running statistics of each prompt (DDPO) instead of the group's."},
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
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of an exponential moving average of the adapter, which is then what is evaluated and "
                  "saved. Unset: none."},
    )

    # --- evaluation and what a run leaves ---
    eval_seed: int = field(default=42, metadata={"help": "Seed of the fixed evaluation noise."})
    num_sample_videos: int = field(
        default=8, metadata={"help": "Videos of each evaluation written to samples/ as mp4, sheet and TensorBoard."}
    )
    fps: int = field(default=8, metadata={"help": "Frames per second of the written videos."})
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to write the first videos of a training rollout at each log, too."}
    )

    # --- TrainingArguments with other defaults ---
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the adapter."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Columns reach the rewards: keep."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between logs."})
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where scalars and videos are logged."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Whether to evaluate before training (when there is an eval_dataset)."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        with warnings.catch_warnings():  # its default comes from TRL, under the name every TRL user knows
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
            super().__post_init__()
        self._read_pipeline_kwargs()
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        self._check_choices()
        self._check_batches()

    def _read_pipeline_kwargs(self) -> None:
        if isinstance(self.pipeline_kwargs, str):
            try:
                self.pipeline_kwargs = json.loads(self.pipeline_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"pipeline_kwargs={self.pipeline_kwargs!r} is not JSON ({error}); write it like "
                    "'{\"max_sequence_length\": 226}'."
                ) from error
        if not isinstance(self.pipeline_kwargs, dict | None):
            raise ValueError(f"pipeline_kwargs={self.pipeline_kwargs!r} must be a dict of the pipeline's arguments.")

    def _check_choices(self) -> None:
        for name, allowed in (
            ("scale_rewards", ("group", "batch", "none")),
            ("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum")),
            ("kl_space", ("x", "v")),
            ("step_weighting", ("none", "guard", "longcat")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")
        if self.fp16:
            raise ValueError("fp16=True is not supported: per-step log-probs lose too many digits. Use bf16 or fp32.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, for instance 0.95.")
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ValueError(f"epsilon={self.epsilon} and epsilon_high={self.epsilon_high} must be positive.")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative: it weights the KL term; 0 leaves it out.")
        if self.sde_window_range is not None and len(self.sde_window_range) != 2:
            raise ValueError(f"sde_window_range={self.sde_window_range} must be two integers, low and high.")
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size would break groups apart; lower per_device_train_batch_size.")
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} is more than "
                f"per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size} keeps."
            )
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} must be at least 1.")

    def _check_batches(self) -> None:
        per_step = self.per_device_train_batch_size * self.world_size
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
                f"{self.world_size} processes) cannot be divided into groups of num_generations="
                f"{self.num_generations}; choose num_generations among {divisors}, or change the batch size."
            )
        if self.steps_per_generation % self.gradient_accumulation_steps and (
            self.gradient_accumulation_steps % self.steps_per_generation
        ):
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: one must divide the other."
            )
        if self.num_generations < 8:
            warnings.warn(
                f"num_generations={self.num_generations}: groups below 8 often give advantages of the wrong sign on "
                "video; training goes on.", stacklevel=2,
            )

    def policy_kwargs(self) -> dict:
        """The arguments of the pipeline's call that this config sets."""
        call = dict(self.pipeline_kwargs or {})
        for name in ("guidance_scale", "height", "width", "num_frames"):
            if getattr(self, name) is not None:
                call[name] = getattr(self, name)
        return call
