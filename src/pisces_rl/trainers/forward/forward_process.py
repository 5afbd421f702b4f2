"""Training on sampled videos that are noised anew: what NFT, AWM, RVM and Flow-DPO share.

No log-probabilities and no stochastic steps: any deterministic sampler draws the videos, only their clean latents x0
are kept, and the model is asked at any noise level. In the coordinates of flow matching, in which every schedule is a
flow (see `policy.schedules`),

    x_t = (1 - t) x0 + t e,    v* = e - x0,    v = (x_t - x0^) / t

with x0^ the model's prediction, whatever it predicts by itself. So v - v* = (x0 - x0^) / t for every family.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...estimate import Held
from ...policy import Rollout
from ..base.data.seeds import sample_seed
from ..rollouts.losses import mean_square
from ..rollouts.rollout_config import RolloutConfig
from ..rollouts.rollout_trainer import Metrics, RolloutTrainer
from ..rollouts.scored import ScoredRollout

NOISE, LEVELS = range(30, 32)  # what a seed is for


@dataclass
class ForwardProcessConfig(RolloutConfig):
    """Settings of every method that trains on noised videos, on top of `RolloutConfig`."""

    beta: float = field(
        default=1e-4, metadata={"help": "Weight of mean (v - v_ref)^2, which holds the policy near the reference."}
    )
    train_levels: int | None = field(
        default=None,
        metadata={
            "help": "At how many noise levels a rollout is trained, drawn without replacement from those of the "
            "schedule each time it is used. Unset: at all."
        },
    )
    train_schedule_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the schedule whose noise levels these are. Unset: num_inference_steps, the levels "
            "that sampling visits."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.beta >= 0:
            raise ValueError(f"beta={self.beta} must not be negative: it weights the distance to the reference.")

    def _check_steps(self, steps: int) -> None:
        super()._check_steps(steps)
        if self.train_schedule_steps is not None and self.train_schedule_steps < 1:
            raise ValueError(f"train_schedule_steps={self.train_schedule_steps} must be at least 1, or unset.")
        levels = self.train_schedule_steps or steps
        if self.train_levels is not None and not 1 <= self.train_levels <= levels:
            raise ValueError(
                f"train_levels={self.train_levels} must lie between 1 and {levels}, the steps of the schedule whose "
                "noise levels are drawn; or leave it unset for all."
            )

    def uses_reference(self) -> bool:
        return super().uses_reference() or self.beta > 0

    def held(self) -> Held:
        return replace(super().held(), predictions=int(self.beta > 0))


@dataclass
class Noised:
    """B videos at one noise level, and what policies make of them.

    Attributes:
        time: t, a scalar.
        clean: (B * rows_per_video, ...) x0, fp32.
        predicted: x0^ of the trained policy, with gradients.
        old: x0^ of the old policy without gradients; None where it is not asked.
        reference: x0^ of the reference policy, likewise.
        average: x0^ of the average policy, likewise.
        advantages: (B,).
    """

    time: Tensor
    clean: Tensor
    predicted: Tensor
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    average: Tensor | None = None

    def mean_square(self, difference: Tensor) -> Tensor:
        """Of each video, (B,)."""
        return mean_square(difference, len(difference) // len(self.advantages))

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """mean (v - v')^2 of two predictions x0^, or to the target v*, of which x0 is the prediction. (B,)"""
        return self.mean_square(one - other) / self.time**2


class ForwardProcessTrainer(RolloutTrainer):
    """The core of the methods that train on noised videos; each says `loss`, and what it is compared with."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        if "audio_vae" in self.pipeline.components:  # the policy itself finds it out in the first update
            raise ValueError(
                f"{type(self.pipeline).__name__} denoises audio beside the video, and {self._name} starts at noise "
                "levels where only the video's state is known: use VideoGRPOTrainer or RewardBackpropTrainer."
            )

    def loss(self, noised: Noised, metrics: Metrics) -> Tensor:
        """The losses of B videos at one noise level, (B,); what is logged goes to `metrics`."""
        raise TypeError(f"{type(self).__name__} has no loss: define loss(noised, metrics).")

    def backward(self, scored: ScoredRollout, rows: list[int], count: int) -> tuple[Tensor, Metrics]:
        metrics: Metrics = defaultdict(list)
        device, steps = self.accelerator.device, self._levels()
        taken, weights = self.taught(scored, rows)
        share = weights.to(device) / (count * len(steps))
        total = torch.zeros((), device=device)
        for samples, places, own in scored.each(taken):  # one part at most: all videos are sampled alike
            for step in steps:
                noised = self._noised(scored, samples, places, own, step)
                loss = (self.loss(noised, metrics) * share).sum()
                with self.logged_gradient(step):
                    self.backward_loss(loss)
                total += loss.detach()
        return total, metrics

    def taught(self, scored: ScoredRollout, rows: list[int]) -> tuple[list[int], Tensor]:
        """The rows of a micro-batch that are trained on, and the weight of each of their losses."""
        taken = self._taken(rows, scored.spread[rows])
        return taken, scored.spread[taken].float()

    def _taken(self, rows: list[int], known: Tensor) -> list[int]:
        """The rows that teach something: not a group whose rewards are equal. Ranks that share weights make the same
        calls, so there they are all taken, and weigh nothing."""
        return rows if self.policy.mesh is not None else [row for row, has in zip(rows, known) if has]

    def _levels(self) -> list[int]:
        """The steps of the schedule at whose noise levels the videos of this rollout are trained in its present use,
        however they are divided into micro-batches."""
        args = self.args
        steps, use = args.train_schedule_steps or args.num_inference_steps, self._step // args.steps_per_generation
        generator = torch.Generator().manual_seed(sample_seed(args.seed, LEVELS, use))
        return torch.randperm(steps, generator=generator)[: args.train_levels].tolist()

    def _noise_row(self, row: int) -> int:
        """By which row of the whole rollout a video's noise is drawn."""
        return row

    def _noised(
        self, scored: ScoredRollout, samples: Rollout, places: list[int], rows: Sequence[int], step: int
    ) -> Noised:
        """The videos `rows` of `scored`, which are `places` of `samples`, at the noise level of a step."""
        args, use = self.args, self._step // self.args.steps_per_generation
        seeds = [sample_seed(args.seed, NOISE, use, self._noise_row(scored.first_row + row), step) for row in rows]
        drawn = {"noise_seeds": seeds, "step": step}
        if args.train_schedule_steps is not None:
            drawn["num_inference_steps"] = args.train_schedule_steps
        given = self.policy.given_frames(samples.conditions)

        def free(latents: Tensor) -> Tensor:
            """What the policy decides about."""
            return latents[:, :, given:] if given else latents

        # Without gradients first: they exchange the adapter's values, for which no graph may wait.
        known = {}
        for name, policy in self.compared(scored).items():
            with policy:
                known[name] = free(self.policy.predict(samples, places, **drawn).clean)
        own = self.policy.predict(samples, places, grad=True, **drawn)
        predicted = free(own.clean)
        return Noised(
            own.time,
            free(samples.clean_rows(places)).to(predicted),
            predicted,
            scored.advantages[list(rows)].to(predicted.device),
            **known,
        )

    def compared(self, scored: ScoredRollout) -> dict[str, AbstractContextManager]:
        """{attribute of `Noised`: a context in which the policy is the one that it is compared with}."""
        return {"reference": self.initial.reference()} if self.args.beta else {}

    def anchored(self, loss: Tensor, noised: Noised, metrics: Metrics) -> Tensor:
        """loss + beta mean (v - v_ref)^2, (B,)."""
        if noised.reference is None:
            return loss
        distance = noised.distance(noised.predicted, noised.reference)
        metrics["velocity/reference_distance"].append(distance.detach().mean())
        return loss + self.args.beta * distance
