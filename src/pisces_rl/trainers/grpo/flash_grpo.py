"""Flash-GRPO (arXiv 2605.15980): GRPO with one stochastic step per prompt, drawn separately for each prompt."""

import os
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..base.data.seeds import sample_seed
from ..rollouts.rollout_trainer import WINDOW
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer


@dataclass
class FlashGRPOConfig(VideoGRPOConfig):
    """Settings of `FlashGRPOTrainer`: those of GRPO with other defaults.

    The window has one step, and step weights cancel its sensitivity to the prediction.
    """

    sde_window_size: int | None = field(
        default=1,
        metadata={
            "help": "Number of consecutive denoising steps that are stochastic and trained; the window is drawn "
            "separately for each prompt. Unset: all steps but the last."
        },
    )
    step_weighting: str = field(
        default="longcat", metadata=VideoGRPOConfig.__dataclass_fields__["step_weighting"].metadata
    )


class FlashGRPOTrainer(VideoGRPOTrainer):
    r"""Flash-GRPO (arXiv 2605.15980): GRPO with a window drawn for each prompt, so that a step sees many noise levels.

    The videos of a group have the same window. The paper's weight 1 / c with
    c = sqrt(D) / s + s sqrt(D) (1 - sigma) / (2 sigma) equals `step_weighting="longcat"` for `flow_sde_linear`, up to
    a factor. Arguments are those of `VideoGRPOTrainer`; `args` is a `FlashGRPOConfig`.

    If ranks share weights, they must make the same calls, so prompts at the same position of each process's share have
    the same window.
    """

    args: FlashGRPOConfig
    _tag_names = ["trl", "grpo", "flash-grpo", "text-to-video", "pisces_rl"]
    _name = "Flash-GRPO"
    papers = (
        *VideoGRPOTrainer.papers,
        Paper("2605.15980", "Flash-GRPO: Efficient Alignment for Video Diffusion via One-Step Policy Optimization"),
    )

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: FlashGRPOConfig | None = None,
        *further: Any,
        **keywords: Any,
    ):
        super().__init__(model, reward_funcs, FlashGRPOConfig() if args is None else args, *further, **keywords)
        args = self.args
        if self.policy.mesh is not None and (
            args.per_device_train_batch_size * args.steps_per_generation % args.num_generations
        ):
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation = "
                f"{args.per_device_train_batch_size * args.steps_per_generation} must be a multiple of "
                f"num_generations={args.num_generations} if processes share weights: windows differ between groups, "
                "so each process needs whole groups. Change one of these settings."
            )

    def trained_steps(self, number: int, group: int) -> list[int]:
        """Return the window of trained steps, drawn for each group."""
        if self.policy.mesh is not None:
            args = self.args
            group %= args.generation_batch_size // args.num_generations // args.data_parts
        return self.policy.draw_window(sample_seed(self.args.seed, number, WINDOW, group))
