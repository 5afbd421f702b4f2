"""Configuration of `VideoGRPOTrainer`."""

from dataclasses import dataclass, field, replace

from ...estimate import Held
from ..rollouts.losses import STEP_WEIGHTING_PAPERS
from ..rollouts.rollout_config import RolloutConfig


@dataclass
class VideoGRPOConfig(RolloutConfig):
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
        metadata={
            "help": "Transition kernel: flow_sde, flow_sde_linear, dance_sde or cps for flow matching, ddim for "
            "epsilon- and v-prediction, ancestral for EDM. Unset: the first that fits the scheduler."
        },
    )
    noise_level: float | None = field(
        default=None,
        metadata={"help": "Noise of the transition (a, or eta). Unset: the value of the kernel's authors."},
    )
    sde_window_size: int | None = field(
        default=None,
        metadata={
            "help": "Consecutive denoising steps that are stochastic and trained; the others are ODE steps. The "
            "window is common to a rollout. Unset: all steps but the last."
        },
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={"help": "Two integers low high: windows lie in the steps [low, high). Unset: all but the last."},
    )
    share_initial_noise: bool = field(
        default=False,
        metadata={
            "help": "Whether the videos of a group start from the same noise, so that only the transitions' "
            "noise tells them apart."
        },
    )
    # --- the objective ---
    beta: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL to the reference (the adapter switched off); 0 skips the reference pass."},
    )
    kl_space: str = field(
        default="x",
        metadata={
            "help": "'x': KL of the transitions, |m - m_ref|^2 / 2 std^2; 'v': |v - v_ref|^2 of the "
            "predictions, the better one when training without guidance."
        },
    )
    epsilon: float = field(default=1e-3, metadata={"help": "Lower clip range of the per-step ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. Unset: epsilon."})
    step_weighting: str = field(
        default="none",
        metadata={
            "help": "Weights across denoising steps: 'none', 'guard' (GRPO-Guard: normalised ratios, 1/dt) or "
            "'longcat' (cancels the sensitivity of a step to the prediction)."
        },
    )
    replay_tolerance: float = field(
        default=1e-3,
        metadata={
            "help": "Training stops when |log p(update) - log p(sampling)| exceeds this before the first "
            "optimizer step on a rollout: rollout and update must be the same computation."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("kl_space", ("x", "v"))
        self.check_choice("step_weighting", tuple(STEP_WEIGHTING_PAPERS))
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ValueError(f"epsilon={self.epsilon} and epsilon_high={self.epsilon_high} must be positive.")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative: it weights the KL term; 0 leaves it out.")
        if self.sde_window_range is not None and len(self.sde_window_range) != 2:
            raise ValueError(f"sde_window_range={self.sde_window_range} must be two integers, low and high.")

    @property
    def upper_epsilon(self) -> float:
        """The upper clip range."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _check_steps(self, steps: int) -> None:
        super()._check_steps(steps)
        if steps < 2:
            raise ValueError(
                f"num_inference_steps={steps}: GRPO needs at least 2 steps, the last is deterministic; "
                "RewardBackpropTrainer takes 1."
            )

    def uses_reference(self) -> bool:
        return super().uses_reference() or self.beta > 0

    def held(self) -> Held:
        """Of K trained steps K means and K + 1 states; with beta predictions and means of the reference."""
        low, high = self.sde_window_range or (0, self.num_inference_steps - 1)
        steps, held = self.sde_window_size or high - low, super().held()
        return replace(held, latents=held.latents + 2 * steps + 1, predictions=2 * steps if self.beta else 0)

    def policy_settings(self) -> dict:
        names = ("transition", "noise_level", "sde_window_size", "sde_window_range")
        return super().policy_settings() | {name: getattr(self, name) for name in names}
