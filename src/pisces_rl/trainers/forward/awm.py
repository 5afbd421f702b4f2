"""Advantage-weighted matching (AWM, arXiv 2509.25050): PPO's clip on a likelihood based on the regression error."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from ...estimate import Held
from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..base.watch.callbacks import AdapterEMA
from ..rollouts.losses import clip_fractions, clipped_policy_loss
from ..rollouts.rollout_trainer import Metrics
from ..rollouts.scored import ScoredRollout
from .forward_process import ForwardProcessConfig, ForwardProcessTrainer, Noised


@dataclass
class AWMConfig(ForwardProcessConfig):
    """Settings of `AWMTrainer`."""

    beta: float = field(default=3e-3, metadata=ForwardProcessConfig.__dataclass_fields__["beta"].metadata)
    power: float = field(
        default=0.25,
        metadata={"help": "Exponent p: the log-likelihood falls with the p-th power of the regression error."},
    )
    epsilon: float = field(
        default=1.0,
        metadata={"help": "Clip range of the ratio to the policy that sampled: 1 - epsilon to 1 + epsilon."},
    )
    average_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the penalty mean (v - v_average)^2, which keeps the policy near a moving average of "
            "the adapter. Raise it for smaller updates. 0 disables it."
        },
    )
    average_decay_rate: float = field(
        default=0.001,
        metadata={"help": "Increase of the average's decay per optimizer step, from 0 up to average_decay_max."},
    )
    average_decay_max: float = field(
        default=0.3, metadata={"help": "Largest decay of the average per optimizer step, in [0, 1)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0 or not self.epsilon > 0:
            raise ValueError(f"power={self.power} and epsilon={self.epsilon} must be positive.")
        if self.average_weight < 0:
            raise ValueError(f"average_weight={self.average_weight} must not be negative; 0 disables the term.")
        if self.average_decay_rate < 0 or not 0 <= self.average_decay_max < 1:
            raise ValueError(
                f"average_decay_rate={self.average_decay_rate} must not be negative, and "
                f"average_decay_max={self.average_decay_max} must lie in [0, 1)."
            )

    def held(self) -> Held:
        held, followers = super().held(), (self.average_weight > 0) + self.reuses_rollouts
        return replace(held, followers=followers, predictions=held.predictions + followers)


def matching_log_prob(error: Tensor, time: Tensor, power: float) -> Tensor:
    """Return log p = -t ((l + 1e-10)^p - 1e-10^p) / p with l = mean (v - v*)^2, (B,). Its slope at l = 0 is finite."""
    return -time * ((error + 1e-10) ** power - 1e-10**power) / power


class AWMTrainer(ForwardProcessTrainer):
    r"""Trains a policy by advantage-weighted matching (AWM, arXiv 2509.25050).

        rho = exp(log p - log p_old) at the same t and e,      log p as in `matching_log_prob`
        L = max(-A rho, -A clip(rho, 1 +- epsilon)) + beta mean (v - v_ref)^2 + average_weight mean (v - v_average)^2

    Arguments are those of `VideoPolicyTrainer`; `args` is an `AWMConfig`.
    """

    args: AWMConfig
    _tag_names = ["trl", "awm", "text-to-video", "pisces_rl"]
    _name = "Advantage-Weighted Matching"
    papers = (Paper("2509.25050", "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models"),)

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: AWMConfig | None = None,
        *further: Any,
        **keywords: Any,
    ):
        super().__init__(model, reward_funcs, AWMConfig() if args is None else args, *further, **keywords)
        if "average" in self.followers:
            self.add_callback(self.followers["average"])  # updated after each optimizer step

    def followed(self) -> dict[str, AdapterEMA]:
        args, followers = self.args, {}

        def decay(step: int) -> float:
            return min(args.average_decay_rate * step, args.average_decay_max)

        if args.reuses_rollouts:  # after the first optimizer step, the policy differs from the one that sampled
            followers["old"] = AdapterEMA(self.adapter, lambda rollout: 0.0)
        if args.average_weight:
            followers["average"] = AdapterEMA(self.adapter, decay)
        return followers

    def before_rollout(self) -> None:
        if "old" in self.followers:
            self.followers["old"].update()

    def compared(self, scored: ScoredRollout) -> dict[str, AbstractContextManager]:
        known = super().compared(scored) | self.followers
        if self.state.global_step == scored.drawn_at:
            known.pop("old", None)  # before the first optimizer step, it equals the trained policy
        return known

    def loss(self, noised: Noised, metrics: Metrics) -> Tensor:
        args, error = self.args, noised.distance(noised.predicted, noised.clean)
        drawn_by = noised.predicted.detach() if noised.old is None else noised.old
        own, old = (
            matching_log_prob(e, noised.time, args.power) for e in (error, noised.distance(drawn_by, noised.clean))
        )
        log_ratio = own - old
        loss = clipped_policy_loss(log_ratio, noised.advantages, args.epsilon, args.epsilon)
        low, high = clip_fractions(log_ratio, noised.advantages, args.epsilon, args.epsilon)
        metrics["clip_ratio/region_mean"].append(low + high)
        metrics["ratio/mean"].append(log_ratio.detach().exp().mean())
        metrics["velocity/error"].append(error.detach().mean())
        metrics["velocity/old_distance"].append(noised.distance(noised.predicted.detach(), drawn_by).mean())
        if noised.average is not None:
            distance = noised.distance(noised.predicted, noised.average)
            metrics["velocity/average_distance"].append(distance.detach().mean())
            loss = loss + args.average_weight * distance
        return self.anchored(loss, noised, metrics)
