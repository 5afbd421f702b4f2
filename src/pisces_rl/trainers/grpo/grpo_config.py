"""Settings of `VideoGRPOTrainer`."""

from dataclasses import dataclass, field, replace

from ...estimate import Held
from ..rollouts.losses import STEP_WEIGHTING_PAPERS
from ..rollouts.rollout_config import RolloutConfig


@dataclass
class VideoGRPOConfig(RolloutConfig):
    r"""Settings of `VideoGRPOTrainer`, in addition to `transformers.TrainingArguments`.

    Names and defaults match `trl.GRPOConfig` if they mean the same. Deliberate differences: `epsilon` (per-step
    Gaussian log-ratios are much smaller than those of tokens), `learning_rate` (trains an adapter, not a language
    model), `bf16` (only if CUDA supports it), `logging_steps=1`, `report_to="tensorboard"` (logs videos),
    `eval_on_start=True` (the "before" of the report), and `logging_nan_inf_filter=False` (it waits for the GPU after
    every micro-batch). There is no `loss_type`, because all videos have the same number of steps.

    Batch sizes: every `steps_per_generation * num_iterations` micro-batches, one rollout of `generation_batch_size`
    videos is sampled, in groups of `num_generations` per prompt. Each optimizer step uses
    `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` videos on each process.
    """

    # --- the policy: how a video is sampled ---
    transition: str | None = field(
        default=None,
        metadata={
            "help": "Stochastic transition kernel: flow_sde, flow_sde_linear, dance_sde or cps for flow matching, "
            "ddim for epsilon- and v-prediction, ancestral for EDM. Unset: the first that fits the scheduler."
        },
    )
    noise_level: float | None = field(
        default=None,
        metadata={
            "help": "Noise scale of the transition (a, or eta), which sets how much the rollouts explore. Unset: the "
            "value of the kernel's authors."
        },
    )
    sde_window_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of consecutive denoising steps that are stochastic and trained; the others are ODE steps. "
            "All videos of a rollout share the window. Fewer steps make an update cheaper. Unset: all steps but the "
            "last."
        },
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "Two integers low high: the window is drawn from the steps [low, high). Unset: all steps but the "
            "last."
        },
    )
    share_initial_noise: bool = field(
        default=False,
        metadata={
            "help": "Start all videos of a group from the same noise, so that they differ only by the noise of the "
            "transitions."
        },
    )
    # --- the objective ---
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL penalty to the reference policy (see continue_reference). Raise it if videos "
            "degrade while the reward rises. 0 skips the reference pass."
        },
    )
    kl_space: str = field(
        default="x",
        metadata={
            "help": "Form of the KL penalty: 'x', the KL of the transitions, |m - m_ref|^2 / 2 std^2; 'v', the "
            "distance of the predictions, |v - v_ref|^2, better for training without guidance."
        },
    )
    epsilon: float = field(
        default=1e-3,
        metadata={
            "help": "Lower clip range of the per-step ratio, which is clipped below 1 - epsilon. Lower it for smaller "
            "updates; clip_ratio/region_mean is the share of clipped terms."
        },
    )
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "Upper clip range of the per-step ratio: the ratio is clipped above 1 + epsilon_high. Unset: "
            "epsilon."
        },
    )
    step_weighting: str = field(
        default="none",
        metadata={
            "help": "Weights of the denoising steps in the loss: 'none' (equal), 'guard' (GRPO-Guard: normalised "
            "ratios, 1/dt) or 'longcat' (cancels each step's sensitivity to the prediction)."
        },
    )
    replay_tolerance: float = field(
        default=1e-3,
        metadata={
            "help": "Training stops if |log p(update) - log p(sampling)| exceeds this value before the first "
            "optimizer step on a rollout, because sampling and update must be the same computation. Raise it only if "
            "the reported error is small next to epsilon."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("kl_space", ("x", "v"))
        self.check_choice("step_weighting", tuple(STEP_WEIGHTING_PAPERS))
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ValueError(f"epsilon={self.epsilon} and epsilon_high={self.epsilon_high} must be positive.")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative: it weights the KL penalty; 0 disables it.")
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
                f"num_inference_steps={steps}: GRPO needs at least 2 steps, because the last is deterministic. "
                "RewardBackpropTrainer works with 1."
            )

    def uses_reference(self) -> bool:
        return super().uses_reference() or self.beta > 0

    def held(self) -> Held:
        """Count K means and K + 1 states for K trained steps and, with beta, the reference's predictions and means."""
        low, high = self.sde_window_range or (0, self.num_inference_steps - 1)
        steps, held = self.sde_window_size or high - low, super().held()
        return replace(held, latents=held.latents + 2 * steps + 1, predictions=2 * steps if self.beta else 0)

    def policy_settings(self) -> dict:
        names = ("transition", "noise_level", "sde_window_size", "sde_window_range")
        return super().policy_settings() | {name: getattr(self, name) for name in names}
