"""Settings of `RewardBackpropTrainer`."""

from dataclasses import dataclass, field, replace

from ...estimate import Held
from ..base.config import VideoPolicyConfig

THROUGH = ("last_steps", "random_steps", "low_variance", "one_step")


@dataclass
class RewardBackpropConfig(VideoPolicyConfig):
    r"""Settings of `RewardBackpropTrainer`, in addition to `transformers.TrainingArguments`.

    Names and defaults match `VideoGRPOConfig` if they mean the same. Each optimizer step uses
    `gradient_accumulation_steps` micro-batches of `per_device_train_batch_size` videos on each process.
    """

    # --- what carries the gradient ---
    backprop_through: str = field(
        default="last_steps",
        metadata={
            "help": "What the gradient passes through. 'last_steps': the last `backprop_steps` denoising steps "
            "(DRaFT-K, VADER). 'random_steps': the last K, with K drawn uniformly from 1 to num_inference_steps for "
            "each micro-batch (AlignProp). 'low_variance': the last step, on `low_variance_samples` fresh noisings of "
            "each sample (DRaFT-LV). 'one_step': the decoded prediction x0^ of one step drawn from one_step_range "
            "(ReFL, PISCES)."
        },
    )
    backprop_steps: int = field(
        default=1,
        metadata={
            "help": "Denoising steps that the gradient passes through under 'last_steps'. Memory grows with them."
        },
    )
    low_variance_samples: int = field(
        default=2,
        metadata={"help": "Noisings of each sample under 'low_variance'. More reduce the variance of the gradient."},
    )
    one_step_range: list[int] | None = field(
        default=None,
        metadata={"help": "Two integers low high: 'one_step' draws its step from [low, high). Unset: all steps."},
    )
    decode_frames: int | None = field(
        default=None,
        metadata={
            "help": "Back-propagate through only this many consecutive latent frames, from a random start, to save "
            "memory. Unless the VAE decodes frame by frame, rewards then see a shorter video. Unset: all frames."
        },
    )
    checkpoint_decoder: bool = field(
        default=True,
        metadata={
            "help": "Recompute the VAE decoder's activations in the backward pass instead of storing them. Set False "
            "to trade memory for speed."
        },
    )

    # --- rewards ---
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "'std' divides each reward by a running average of its standard deviation over the samples of an "
            "optimizer step, so that reward_weights compare rewards on one scale; 'none' does not."
        },
    )
    reward_std_decay: float = field(
        default=0.9,
        metadata={"help": "Decay per optimizer step of the running average that scale_rewards='std' uses, in [0, 1)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("backprop_through", THROUGH), ("scale_rewards", ("none", "std"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")
        for name in ("low_variance_samples", "decode_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.reward_std_decay < 1:
            raise ValueError(f"reward_std_decay={self.reward_std_decay} must lie in [0, 1).")

    def held(self) -> Held:
        """Count the graphs of the trained steps and of the decoder."""
        graphs = {"last_steps": self.backprop_steps, "random_steps": self.num_inference_steps}
        return replace(
            super().held(),
            graphs=graphs.get(self.backprop_through, 1),
            decode_frames=self.decode_frames,
            decoder="checkpointed" if self.checkpoint_decoder else "kept",
        )

    def _check_steps(self, steps: int) -> None:
        super()._check_steps(steps)
        if not 1 <= self.backprop_steps <= steps:
            raise ValueError(
                f"backprop_steps={self.backprop_steps} must lie between 1 and num_inference_steps={steps}."
            )
        window = self.one_step_range or [0, steps]
        if len(window) != 2 or not 0 <= window[0] < window[1] <= steps:
            raise ValueError(
                f"one_step_range={self.one_step_range} must be two integers with 0 <= low < high <= "
                f"num_inference_steps={steps}."
            )
