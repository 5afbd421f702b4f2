"""Reward-weighted velocity matching (RVM, arXiv 2608.23664): a bounded velocity step from reward and reference."""

import os
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..rollouts.rollout_trainer import Metrics
from .forward_process import ForwardProcessConfig, ForwardProcessTrainer, Noised


@dataclass
class RVMConfig(ForwardProcessConfig):
    """Settings of `RVMTrainer`. Advantages are divided by the batch's standard deviation, as the paper does."""

    beta: float = field(
        default=0.01,
        metadata={
            "help": "b_ref: weight of v - v_ref in the velocity step, which keeps the policy near the reference. "
            "Raise it if videos degrade while the reward rises. 0 skips the reference pass."
        },
    )
    reward_scale: float = field(
        default=0.1,
        metadata={"help": "Factor of the clipped advantage in the velocity step. Raise it to weight rewards more."},
    )
    scale_rewards: str = field(
        default="batch", metadata=ForwardProcessConfig.__dataclass_fields__["scale_rewards"].metadata
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_scale > 0:
            raise ValueError(f"reward_scale={self.reward_scale} must be positive: it scales the advantages.")


def rvm_step(noised: Noised, reward_scale: float, beta: float) -> Tensor:
    """Return the step that is subtracted from the velocity, g = a (v - v*) + b_ref (v - v_ref), a = reward_scale A.

    Shape (B * rows_per_video, ...), without gradients.
    """
    predicted = noised.predicted.detach()
    rows = len(predicted) // len(noised.advantages)
    a = (reward_scale * noised.advantages).repeat_interleave(rows).view(-1, *[1] * (predicted.ndim - 1))
    g = a * (noised.clean - predicted)
    if noised.reference is not None:
        g = g + beta * (noised.reference - predicted)
    return g / noised.time


class RVMTrainer(ForwardProcessTrainer):
    r"""Trains a policy by reward-weighted velocity matching (RVM, arXiv 2608.23664).

        g = a (v - v*) + b_ref (v - v_ref),      L = 1/2 mean (v - stop_grad(v - g))^2

    L has the gradient of a regression whose sign follows the reward, but it is bounded below. Arguments are those of
    `VideoPolicyTrainer`; `args` is an `RVMConfig`.
    """

    args: RVMConfig
    _tag_names = ["trl", "rvm", "text-to-video", "pisces_rl"]
    _name = "Reward-Weighted Velocity Matching"
    papers = (Paper("2608.23664", "Reward-Weighted Velocity Matching"),)

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: RVMConfig | None = None,
        *further: Any,
        **keywords: Any,
    ):
        super().__init__(model, reward_funcs, RVMConfig() if args is None else args, *further, **keywords)

    def loss(self, noised: Noised, metrics: Metrics) -> Tensor:
        g = rvm_step(noised, self.args.reward_scale, self.args.beta)
        v = -noised.predicted / noised.time  # v up to the constant x_t / t
        metrics["velocity/step"].append(noised.mean_square(g).mean())
        metrics["velocity/error"].append(noised.distance(noised.predicted.detach(), noised.clean).mean())
        if noised.reference is not None:
            distance = noised.distance(noised.predicted.detach(), noised.reference)
            metrics["velocity/reference_distance"].append(distance.mean())
        return 0.5 * noised.mean_square(v - (v.detach() - g))
