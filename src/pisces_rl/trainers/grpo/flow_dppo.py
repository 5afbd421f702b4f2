"""Flow-DPPO (arXiv 2606.11025): a mask by the divergence of the policies in the place of PPO's clip."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...policy import ReplayStep, Rollout
from ...transitions import Paper
from ..rollouts.losses import kl_to_reference
from .grpo_config import VideoGRPOConfig
from .grpo_trainer import VideoGRPOTrainer


@dataclass
class FlowDPPOConfig(VideoGRPOConfig):
    """Settings of [`FlowDPPOTrainer`]: those of GRPO, of which `epsilon` and `epsilon_high` are refused."""

    without_effect: ClassVar[dict[str, str]] = dict.fromkeys(
        ("epsilon", "epsilon_high"), "Flow-DPPO does not clip the ratio; set divergence_limit."
    )
    divergence_limit: float = field(
        default=1e-5,
        metadata={
            "help": "A step's term is left out where KL(old, new) of its transition, a dimension, exceeds this "
            "and the ratio moves on."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.reuses_rollouts:
            warnings.warn(
                "with one optimizer step a rollout the policy is the one that sampled it, so nothing "
                "exceeds divergence_limit and this is GRPO: set num_iterations=2, or more "
                "steps_per_generation.",
                stacklevel=2,
            )
        if not self.divergence_limit > 0:
            raise ValueError(f"divergence_limit={self.divergence_limit} must be positive.")
        if self.step_weighting == "guard":
            raise ValueError(
                "step_weighting='guard' normalises ratios for a clip, and Flow-DPPO has none; choose "
                "'none' or 'longcat'."
            )


class FlowDPPOTrainer(VideoGRPOTrainer):
    r"""GRPO whose trust region is a divergence (Flow-DPPO, arXiv 2606.11025).

        L = -A rho,  without those terms where KL(p_old, p) > limit and rho moves with A:
            A > 0 and rho > 1, or A < 0 and rho < 1

    A step of a video far from the old policy is still led back. Arguments are those of `VideoGRPOTrainer`; `args` is
    a `FlowDPPOConfig`.
    """

    _tag_names = ["trl", "grpo", "flow-dppo", "text-to-video", "pisces_rl"]
    _name = "Flow-DPPO"
    papers = (
        *VideoGRPOTrainer.papers,
        Paper("2606.11025", "Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models"),
    )

    def __init__(self, model, reward_funcs=None, args=None, *further, **keywords):
        super().__init__(model, reward_funcs, FlowDPPOConfig() if args is None else args, *further, **keywords)

    def policy_loss(
        self, step: ReplayStep, log_ratio: Tensor, advantage: Tensor, samples: Rollout
    ) -> tuple[Tensor, Tensor, Tensor]:
        old_mean = samples.mean_rows(step.index, step.rows)
        divergence = kl_to_reference(step.mean.detach(), old_mean, step.std, samples.rows_per_video)
        left_out = (divergence > self.args.divergence_limit) & (log_ratio.detach() * advantage > 0)
        loss = (-advantage * log_ratio.exp()).masked_fill(left_out, 0.0)
        return loss, (left_out & (advantage < 0)).float().mean(), (left_out & (advantage > 0)).float().mean()
