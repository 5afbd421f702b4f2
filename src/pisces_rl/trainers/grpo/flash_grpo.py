"""Flash-GRPO (arXiv 2605.15980): one stochastic step a prompt, another one for another prompt."""

from dataclasses import dataclass, field

from ...transitions import Paper
from ..base.data.seeds import sample_seed
from ..rollouts.rollout_trainer import WINDOW
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer


@dataclass
class FlashGRPOConfig(VideoGRPOConfig):
    """Settings of [`FlashGRPOTrainer`]: those of GRPO, with a window of one step and weights that cancel the step's
    sensitivity to the prediction."""

    sde_window_size: int | None = field(
        default=1,
        metadata={
            "help": "Consecutive denoising steps that are stochastic and trained, drawn for each prompt. Unset: "
            "all steps but the last."
        },
    )
    step_weighting: str = field(
        default="longcat", metadata=VideoGRPOConfig.__dataclass_fields__["step_weighting"].metadata
    )


class FlashGRPOTrainer(VideoGRPOTrainer):
    r"""GRPO whose window is drawn for each prompt, so that an optimizer step sees many noise levels
    (Flash-GRPO, arXiv 2605.15980).

    The videos of a group have the same window. Its weight 1 / c, c = sqrt(D) / s + s sqrt(D) (1 - sigma) / (2 sigma),
    is that of `step_weighting="longcat"` for `flow_sde_linear`, up to a factor. Arguments are those of
    `VideoGRPOTrainer`; `args` is a `FlashGRPOConfig`.

    Where ranks share weights, they must make the same calls: prompts at the same place of each process's share then
    have the same window.
    """

    _tag_names = ["trl", "grpo", "flash-grpo", "text-to-video", "pisces_rl"]
    _name = "Flash-GRPO"
    papers = (
        *VideoGRPOTrainer.papers,
        Paper("2605.15980", "Flash-GRPO: Efficient Alignment for Video Diffusion via One-Step Policy Optimization"),
    )

    def __init__(self, model, reward_funcs=None, args=None, *further, **keywords):
        super().__init__(model, reward_funcs, FlashGRPOConfig() if args is None else args, *further, **keywords)
        args = self.args
        if self.policy.mesh is not None and (
            args.per_device_train_batch_size * args.steps_per_generation % args.num_generations
        ):
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation = "
                f"{args.per_device_train_batch_size * args.steps_per_generation} is no multiple of num_generations="
                f"{args.num_generations}, so groups lie on several processes; with shared weights each process needs "
                "whole groups, since their windows differ."
            )

    def trained_steps(self, number: int, group: int) -> list[int]:
        """A window of the schedule for each group."""
        if self.policy.mesh is not None:
            args = self.args
            group %= args.generation_batch_size // args.num_generations // args.data_parts
        return self.policy.draw_window(sample_seed(self.args.seed, number, WINDOW, group))
