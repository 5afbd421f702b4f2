"""DiffusionNFT (arXiv 2509.16117): regression towards videos with high rewards and away from those with low ones."""

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
from ..rollouts.rollout_trainer import Metrics
from ..rollouts.scored import ScoredRollout
from .forward_process import ForwardProcessConfig, ForwardProcessTrainer, Noised


@dataclass
class NFTConfig(ForwardProcessConfig):
    """Settings of `NFTTrainer`."""

    mixture: float = field(
        default=1.0,
        metadata={
            "help": "b (beta in the paper): share of the trained policy in the two implicit policies that are "
            "regressed. It bounds how far the policy moves from the old one; lower it to allow larger moves."
        },
    )
    contrast: float = field(
        default=5.0,
        metadata={
            "help": "C: an advantage of C or more has the full effect. Lower it so that advantages have more effect; "
            "with scale_rewards='group', none in a group of 8 exceeds 2.5."
        },
    )
    old_decay_rate: float = field(
        default=0.001,
        metadata={
            "help": "Increase per rollout of the decay with which the old policy, which samples, follows the trained "
            "one, up to old_decay_max."
        },
    )
    old_decay_max: float = field(
        default=0.5, metadata={"help": "Largest decay of the old policy per rollout, in [0, 1)."}
    )
    old_decay_start: int = field(
        default=0,
        metadata={
            "help": "Rollouts before the decay starts to grow. Until then, the old policy equals the trained one."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixture", "contrast"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive: the loss divides by it.")
        if self.contrast > self.advantage_clip:
            raise ValueError(
                f"contrast={self.contrast} must not exceed advantage_clip={self.advantage_clip}: clipped advantages "
                "would never have the full effect. Lower contrast, or raise advantage_clip."
            )
        if self.old_decay_rate < 0 or not 0 <= self.old_decay_max < 1 or self.old_decay_start < 0:
            raise ValueError(
                f"old_decay_rate={self.old_decay_rate} and old_decay_start={self.old_decay_start} must not be "
                f"negative, and old_decay_max={self.old_decay_max} must lie in [0, 1): at 1 the old policy would "
                "never change."
            )

    def held(self) -> Held:
        held = super().held()
        return replace(held, followers=1, drawn_by_follower=True, predictions=held.predictions + 1)


def nft_loss(noised: Noised, mixture: float, contrast: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy term of DiffusionNFT, written with predictions x0^ of the clean sample.

        r = clip(A, +-C) / 2C + 1/2
        x+ = b x0^ + (1 - b) x0^_old,     x- = (1 + b) x0^_old - b x0^,     w+- = max(mean |x+- - x0|, 1e-5)
        L = C / b [ r mean (x+ - x0)^2 / w+  +  (1 - r) mean (x- - x0)^2 / w- ]

    w+- are constants without gradients. x+- = x_t - t v+- for the velocities v+ = b v + (1 - b) v_old and
    v- = (1 + b) v_old - b v.

    Args:
        noised: B videos with the predictions of the trained and the old policy.
        mixture: b.
        contrast: C.

    Returns:
        (loss, w+, w-): (B,) each; the loss carries gradients.
    """
    r = noised.advantages.clamp(-contrast, contrast) / (2 * contrast) + 0.5
    rows = len(noised.clean) // len(r)
    towards = noised.old + mixture * (noised.predicted - noised.old) - noised.clean
    away = noised.old - mixture * (noised.predicted - noised.old) - noised.clean
    weights = [
        side.detach().abs().flatten(1).mean(1).view(-1, rows).mean(1).clamp(min=1e-5) for side in (towards, away)
    ]
    plus, minus = (noised.mean_square(side) / weight for side, weight in zip((towards, away), weights))
    return contrast / mixture * (r * plus + (1 - r) * minus), weights[0], weights[1]


class NFTTrainer(ForwardProcessTrainer):
    r"""Trains a policy by DiffusionNFT (arXiv 2509.16117), on samples of an old policy with fresh noise.

        L = nft_loss + beta mean (v - v_ref)^2,    old <- eta old + (1 - eta) trained after each rollout

    Arguments are those of `VideoPolicyTrainer`; `args` is an `NFTConfig`.
    """

    args: NFTConfig
    _tag_names = ["trl", "nft", "text-to-video", "pisces_rl"]
    _name = "DiffusionNFT"
    papers = (Paper("2509.16117", "DiffusionNFT: Online Diffusion Reinforcement with Forward Process"),)

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: NFTConfig | None = None,
        *further: Any,
        **keywords: Any,
    ):
        super().__init__(model, reward_funcs, NFTConfig() if args is None else args, *further, **keywords)

    def followed(self) -> dict[str, AdapterEMA]:
        args = self.args

        def decay(rollout: int) -> float:
            return min(max(rollout - args.old_decay_start, 0) * args.old_decay_rate, args.old_decay_max)

        return {"old": AdapterEMA(self.adapter, decay)}

    def sampling_policy(self) -> AbstractContextManager:
        return self.followers["old"]

    def before_rollout(self) -> None:
        self.followers["old"].update()

    def compared(self, scored: ScoredRollout) -> dict[str, AbstractContextManager]:
        return super().compared(scored) | {"old": self.followers["old"]}

    def loss(self, noised: Noised, metrics: Metrics) -> Tensor:
        loss, plus, minus = nft_loss(noised, self.args.mixture, self.args.contrast)
        metrics["velocity/old_distance"].append(noised.distance(noised.predicted.detach(), noised.old).mean())
        metrics["weight/plus"].append(plus.mean())
        metrics["weight/minus"].append(minus.mean())
        return self.anchored(loss, noised, metrics)
