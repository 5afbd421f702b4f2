"""Flow-DPPO (arXiv 2606.11025): GRPO with a divergence mask instead of PPO's clip."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor

from ...policy import ReplayStep, Rollout
from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..rollouts.losses import kl_to_reference
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer


@dataclass
class FlowDPPOConfig(VideoGRPOConfig):
    """Settings of `FlowDPPOTrainer`: those of GRPO, without `epsilon` and `epsilon_high`."""

    without_effect: ClassVar[dict[str, str]] = dict.fromkeys(
        ("epsilon", "epsilon_high"), "Flow-DPPO does not clip the ratio; set divergence_limit."
    )
    divergence_limit: float = field(
        default=1e-5,
        metadata={
            "help": "Limit on the KL divergence per dimension between the old and the new policy's transition. Beyond "
            "it, a step's loss is dropped if it would move the ratio further from 1. Lower it for smaller updates."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reuses_rollouts:
            warnings.warn(
                "with one optimizer step per rollout, the policy is still the one that sampled, so divergence_limit "
                "is never exceeded and Flow-DPPO equals GRPO: set num_iterations=2, or raise steps_per_generation.",
                stacklevel=2,
            )
        if not self.divergence_limit > 0:
            raise ValueError(f"divergence_limit={self.divergence_limit} must be positive.")
        if self.step_weighting == "guard":
            raise ValueError(
                "step_weighting='guard' normalises ratios for a clip, but Flow-DPPO does not clip; choose 'none' or "
                "'longcat'."
            )


class FlowDPPOTrainer(VideoGRPOTrainer):
    r"""Flow-DPPO (arXiv 2606.11025): GRPO with a trust region that is defined by a divergence.

        L = -A rho,  but 0 if KL(p_old, p) > limit and rho has already moved in the direction of A:
            A > 0 and rho > 1, or A < 0 and rho < 1

    Terms that move a step back towards the old policy always count. Arguments are those of `VideoGRPOTrainer`; `args`
    is a `FlowDPPOConfig`.
    """

    args: FlowDPPOConfig
    _tag_names = ["trl", "grpo", "flow-dppo", "text-to-video", "pisces_rl"]
    _name = "Flow-DPPO"
    papers = (
        *VideoGRPOTrainer.papers,
        Paper("2606.11025", "Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models"),
    )

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: FlowDPPOConfig | None = None,
        *further: Any,
        **keywords: Any,
    ):
        super().__init__(model, reward_funcs, FlowDPPOConfig() if args is None else args, *further, **keywords)

    def policy_loss(
        self, step: ReplayStep, log_ratio: Tensor, advantage: Tensor, samples: Rollout
    ) -> tuple[Tensor, Tensor, Tensor]:
        old_mean = samples.mean_rows(step.index, step.rows)
        divergence = kl_to_reference(step.mean.detach(), old_mean, step.std, samples.rows_per_video)
        left_out = (divergence > self.args.divergence_limit) & (log_ratio.detach() * advantage > 0)
        loss = (-advantage * log_ratio.exp()).masked_fill(left_out, 0.0)
        return loss, (left_out & (advantage < 0)).float().mean(), (left_out & (advantage > 0)).float().mean()
