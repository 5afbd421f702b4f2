"""Base of NFT, AWM, RVM and Flow-DPO, which add fresh noise to sampled videos and train on the predictions.

They need no log-probabilities and no stochastic steps: any deterministic sampler draws the videos, only their clean
latents x0 are kept, and the model can be trained at any noise level. In the coordinates of flow matching, in which
every schedule is a flow (see `policy.schedules`),

    x_t = (1 - t) x0 + t e,    v* = e - x0,    v = (x_t - x0^) / t

x0^ is the model's prediction of x0, converted from whatever the model predicts. So v - v* = (x0 - x0^) / t for all
model families.
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

NOISE, LEVELS = range(30, 32)  # purposes of seeds


@dataclass
class ForwardProcessConfig(RolloutConfig):
    """Settings of every method that trains on noised videos, in addition to `RolloutConfig`."""

    beta: float = field(
        default=1e-4,
        metadata={
            "help": "Weight of the penalty mean (v - v_ref)^2, which keeps the policy near the reference. Raise it if "
            "videos degrade while the reward rises. 0 skips the reference pass."
        },
    )
    train_levels: int | None = field(
        default=None,
        metadata={
            "help": "Number of noise levels to train a rollout at, drawn without replacement from the schedule at "
            "each use of the rollout. Fewer make an update cheaper. Unset: all levels."
        },
    )
    train_schedule_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the schedule that the noise levels are taken from. Unset: num_inference_steps, the "
            "levels that sampling visits."
        },
    )

    def __post_init__(self) -> None:
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
                f"train_levels={self.train_levels} must lie between 1 and {levels}, the steps of the schedule that "
                "the noise levels are drawn from; or leave it unset for all levels."
            )

    def uses_reference(self) -> bool:
        return super().uses_reference() or self.beta > 0

    def held(self) -> Held:
        return replace(super().held(), predictions=int(self.beta > 0))


@dataclass
class Noised:
    """B videos at one noise level, and the predictions of the policies.

    Attributes:
        time: t, a scalar.
        clean: (B * rows_per_video, ...) x0, fp32.
        predicted: x0^ of the trained policy, with gradients.
        old: x0^ of the old policy, without gradients; None if the method does not use it.
        reference: x0^ of the reference policy, likewise.
        average: x0^ of the averaged policy, likewise.
        advantages: (B,) advantages.
    """

    time: Tensor
    clean: Tensor
    predicted: Tensor
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    average: Tensor | None = None

    def mean_square(self, difference: Tensor) -> Tensor:
        """Return the mean square of each video, (B,)."""
        return mean_square(difference, len(difference) // len(self.advantages))

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Return mean (v - v')^2 between two predictions x0^, (B,); for the distance to v*, pass x0 as one of them."""
        return self.mean_square(one - other) / self.time**2


class ForwardProcessTrainer(RolloutTrainer):
    """Base of the trainers that train on noised videos; a method overrides `loss` and `compared`."""

    args: ForwardProcessConfig

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        if "audio_vae" in self.pipeline.components:  # fail now; the policy would fail only in the first update
            raise ValueError(
                f"{type(self.pipeline).__name__} denoises audio together with the video, but {self._name} trains at "
                "noise levels for which only the state of the video is known: use VideoGRPOTrainer or "
                "RewardBackpropTrainer."
            )

    def loss(self, noised: Noised, metrics: Metrics) -> Tensor:
        """Return the losses of B videos at one noise level, (B,); add values to log to `metrics`."""
        raise TypeError(f"{type(self).__name__} has no loss: define loss(noised, metrics).")

    def backward(self, scored: ScoredRollout, rows: list[int], count: int) -> tuple[Tensor, Metrics]:
        metrics: Metrics = defaultdict(list)
        device, steps = self.accelerator.device, self._levels()
        taken, weights = self.taught(scored, rows)
        share = weights.to(device) / (count * len(steps))
        total = torch.zeros((), device=device)
        for samples, places, own in scored.each(taken):  # at most one part, because no step is stochastic
            for step in steps:
                noised = self._noised(scored, samples, places, own, step)
                loss = (self.loss(noised, metrics) * share).sum()
                with self.logged_gradient(step):
                    self.backward_loss(loss)
                total += loss.detach()
        return total, metrics

    def taught(self, scored: ScoredRollout, rows: list[int]) -> tuple[list[int], Tensor]:
        """Return the rows of a micro-batch to train on, and the weights of their losses."""
        taken = self._taken(rows, scored.spread[rows])
        return taken, scored.spread[taken].float()

    def _taken(self, rows: list[int], known: Tensor) -> list[int]:
        """Return the rows with a gradient, that is, without groups whose rewards are equal.

        Ranks that share weights must make the same calls, so they take all rows, with weight 0 for those without.
        """
        return rows if self.policy.mesh is not None else [row for row, has in zip(rows, known) if has]

    def _levels(self) -> list[int]:
        """Return the steps of the schedule whose noise levels this use of the rollout trains, in all micro-batches."""
        args = self.args
        steps, use = args.train_schedule_steps or args.num_inference_steps, self._step // args.steps_per_generation
        generator = torch.Generator().manual_seed(sample_seed(args.seed, LEVELS, use))
        return torch.randperm(steps, generator=generator)[: args.train_levels].tolist()

    def _noise_row(self, row: int) -> int:
        """Return the row of the whole rollout that seeds a video's noise."""
        return row

    def _noised(
        self, scored: ScoredRollout, samples: Rollout, places: list[int], rows: Sequence[int], step: int
    ) -> Noised:
        """Return the videos `rows` of `scored`, which are `places` of `samples`, at the noise level of a step."""
        args, use = self.args, self._step // self.args.steps_per_generation
        seeds = [sample_seed(args.seed, NOISE, use, self._noise_row(scored.first_row + row), step) for row in rows]
        drawn = {"noise_seeds": seeds, "step": step}
        if args.train_schedule_steps is not None:
            drawn["num_inference_steps"] = args.train_schedule_steps
        given = self.policy.given_frames(samples.conditions)

        def free(latents: Tensor) -> Tensor:
            """Drop the given frames, which the policy does not generate."""
            return latents[:, :, given:] if given else latents

        # Predict without gradients first: that swaps the adapter's values, which must not happen under a live graph.
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
        """Return {attribute of `Noised`: a context in which the policy is the one to compare with}."""
        return {"reference": self.initial.reference()} if self.args.beta else {}

    def anchored(self, loss: Tensor, noised: Noised, metrics: Metrics) -> Tensor:
        """Return loss + beta mean (v - v_ref)^2, (B,)."""
        if noised.reference is None:
            return loss
        distance = noised.distance(noised.predicted, noised.reference)
        metrics["velocity/reference_distance"].append(distance.detach().mean())
        return loss + self.args.beta * distance
