"""Flow-DPO: preferences between two videos of a prompt (arXiv 2501.13918, after Diffusion-DPO, arXiv 2311.12908)."""

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...estimate import Held
from ...policy import Rollout
from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..base.data.pairs import SIDES, check_pairs, pair_of
from ..base.data.seeds import sample_seed
from ..base.data.video_data import undecoded
from ..base.setup.checks import check_dataset
from ..rollouts.rollout_trainer import Metrics
from ..rollouts.scored import ScoredRollout
from .forward_process import ForwardProcessConfig, ForwardProcessTrainer, Noised

VIDEO = 40  # purpose of seeds
#: Settings of rollouts and rewards, which have no effect with pairs from a dataset.
OF_ROLLOUTS = (
    "overlap_rewards",
    "log_completions",
    "per_prompt_stat_tracking",
    "rollout_batch_size",
    "reward_weights",
    "multi_objective_aggregation",
)


@dataclass
class FlowDPOConfig(ForwardProcessConfig):
    """Settings of `FlowDPOTrainer`. A micro-batch holds whole groups, and two videos of each are trained on.

    With pairs from a dataset, each group is a pair, so `num_generations` must be 2. `scale_rewards` and
    `advantage_clip` cannot be set, because only the order of a group's rewards counts.
    """

    without_effect: ClassVar[dict[str, str]] = dict.fromkeys(
        ("scale_rewards", "advantage_clip"),
        "Flow-DPO trains on the best and worst video of a group, so only the order of a group's rewards counts; leave "
        "it out.",
    )
    small_group: ClassVar[int] = 2  # the signs of advantages do not matter
    beta: float = field(
        default=500.0,
        metadata={
            "help": "Strength of the tie to the reference, as in DPO. Raise it to keep the policy nearer to the "
            "reference."
        },
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Initial learning rate of the trained weights (the adapter, by default)."}
    )
    sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the regression loss mean (v - v*)^2 on the preferred video. Raise it if the likelihood "
            "of both videos falls (velocity/winner_error rises). 0 disables it."
        },
    )
    advantage_clip: float = field(
        default=math.inf,
        metadata={"help": "Not supported: a clip could make the best and the second-best video equal."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive: it scales the preference.")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight={self.sft_weight} must not be negative; 0 disables the term.")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be a multiple of "
                f"num_generations={self.num_generations}: the two videos of a pair are trained on together."
            )

    def held(self) -> Held:
        return replace(super().held(), trained=2 * self.per_device_train_batch_size // self.num_generations)


def preference_loss(error: Tensor, reference_error: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the DPO loss of P pairs, whose rows are winner, loser, winner, loser, ...

        margin = - beta / 2 [ (l - l_ref)(winner) - (l - l_ref)(loser) ],     L = -log sigmoid(margin)

    with l = mean (v - v*)^2 at the same t and e for both videos.

    Args:
        error: (2 P,) l of the trained policy, with gradients.
        reference_error: (2 P,) l_ref of the reference.
        beta: strength of the tie to the reference.

    Returns:
        (loss, margin): (P,) each.
    """
    winner, loser = (error - reference_error).view(-1, 2).unbind(1)
    margin = -beta / 2 * (winner - loser)
    return -logsigmoid(margin), margin


class FlowDPOTrainer(ForwardProcessTrainer):
    r"""Trains a policy by direct preference optimisation of a flow (Flow-DPO, arXiv 2501.13918).

        L = preference_loss + sft_weight mean (v - v*)^2 (winner)

    Online, with rewards: prefers the best to the worst video of each group; groups with equal rewards are skipped.
    Offline, if train_dataset has columns `chosen` and `rejected`: trains on these pairs of videos for each `prompt`,
    without rewards. A video is a path, the bytes of a file, a `datasets.Video` or a tensor (F, 3, H, W).

    Arguments are those of `VideoPolicyTrainer`; `args` is a `FlowDPOConfig`.
    """

    args: FlowDPOConfig
    _tag_names = ["trl", "dpo", "text-to-video", "pisces_rl"]
    _name = "Flow-DPO"
    papers = (
        Paper("2501.13918", "Improving Video Generation with Human Feedback"),
        Paper("2311.12908", "Diffusion Model Alignment Using Direct Preference Optimization"),
    )

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: FlowDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        *further: Any,
        **keywords: Any,
    ):
        args = FlowDPOConfig() if args is None else args
        check_dataset("train_dataset", train_dataset)
        train_dataset = undecoded(train_dataset)
        self.offline = bool(set(SIDES) & set(train_dataset.column_names))
        self._rewards_optional = self.offline
        if not self.offline and (reward_funcs is None or reward_funcs == []):
            raise ValueError(
                "reward_funcs is empty, and train_dataset has no columns `chosen` and `rejected`, only "
                f"{train_dataset.column_names}: pass rewards to choose the best and worst video of each group, or add "
                "pairs of videos in these columns."
            )
        if self.offline:
            check_pairs(train_dataset)
            if reward_funcs is not None and reward_funcs != []:
                raise ValueError(
                    "reward_funcs is given, but train_dataset holds pairs (chosen, rejected), which are trained on "
                    "instead. Leave reward_funcs out, or remove these columns; judge_funcs work in either case."
                )
            if args.num_generations != 2 or args.num_iterations != 1:
                raise ValueError(
                    f"num_generations={args.num_generations} and num_iterations={args.num_iterations}, but "
                    "train_dataset holds pairs (chosen, rejected): set num_generations=2 and num_iterations=1."
                )
            for name in OF_ROLLOUTS:
                if getattr(args, name) != args.__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}={getattr(args, name)!r}, but train_dataset holds pairs (chosen, "
                        "rejected): nothing is sampled or scored. Leave it out."
                    )
        super().__init__(model, reward_funcs, args, train_dataset, *further, **keywords)

    @property
    def kept_together(self) -> int:
        return self.args.num_generations

    def compared(self, scored: ScoredRollout) -> dict[str, AbstractContextManager]:
        return {"reference": self.initial.reference()}

    def _noise_row(self, row: int) -> int:
        """Give both videos of a pair the same noise, that of their group."""
        return row // self.args.num_generations

    # --- pairs of a dataset -----------------------------------------------------------------------------------------

    def _generate_and_score(self, inputs: list[dict]) -> None:
        if not self.offline:
            super()._generate_and_score(inputs)
            return
        self._draw_again(inputs, {"at": self.state.global_step})

    def _draw_again(self, inputs: list[dict], state: dict) -> None:
        if not self.offline:
            super()._draw_again(inputs, state)
            return
        prompts, _, images = self._columns(inputs)
        with self.stage("rollout"):
            videos = self._encoded(inputs, prompts, images)
        whole = len(prompts) * self.args.data_parts
        advantages = torch.tensor([1.0, -1.0]).repeat(whole // 2)  # each prompt occurs twice: chosen, rejected
        self._take(
            [(list(range(len(prompts))), videos)],
            state | {"advantages": advantages, "spread": advantages != 0},
            len(prompts),
        )

    def _encoded(self, inputs: list[dict], prompts: list[str], images: dict[str, list]) -> Rollout:
        """Encode the pairs into a rollout of clean latents."""
        codec = self.policy.latent_codec({name: own[:1] for name, own in images.items()})
        pairs = (pair_of(first, codec.video[0]) for first in inputs[::2])  # encoded one at a time to save memory
        latents = [
            codec.encode(self.policy.pipeline, torch.stack([codec.fitted(video) for video in pair])) for pair in pairs
        ]
        seeds = [sample_seed(self.args.seed, VIDEO, self._step, row) for row in range(len(prompts))]
        return Rollout(prompts, seeds, None, [], conditions=images, clean=torch.cat(latents))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def taught(self, scored: ScoredRollout, rows: list[int]) -> tuple[list[int], Tensor]:
        """Return the rows winner, loser, ... of the P groups to train on, and their (P,) weights.

        Winner and loser are the best and the worst of a group's videos that have a reward. The weight is G, because
        one pair stands for the G videos of a group, or 0 if no video is better than another.
        """
        size, pairs = self.args.num_generations, []
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            advantages, unknown = scored.advantages[group], ~scored.ranked[group]
            pairs += [
                group[int(advantages.masked_fill(unknown, -math.inf).argmax())],
                group[int(advantages.masked_fill(unknown, math.inf).argmin())],
            ]
        winners, losers = pairs[::2], pairs[1::2]
        known = scored.ranked[winners] & (scored.advantages[winners] > scored.advantages[losers])
        taken = self._taken(pairs, known.repeat_interleave(2))
        return taken, size * (known.float() if len(taken) == len(pairs) else torch.ones(len(taken) // 2))

    def loss(self, noised: Noised, metrics: Metrics) -> Tensor:
        """Return the (P,) losses of rows winner, loser, ..."""
        error = noised.distance(noised.predicted, noised.clean)
        loss, margin = preference_loss(error, noised.distance(noised.reference, noised.clean), self.args.beta)
        metrics["rewards/margins"].append(margin.detach().mean())
        metrics["rewards/accuracies"].append((margin > 0).float().mean())
        distance = noised.distance(noised.predicted.detach(), noised.reference)
        metrics["velocity/reference_distance"].append(distance.mean())
        winner, loser = error.detach().view(-1, 2).mean(0)
        metrics["velocity/winner_error"].append(winner)
        metrics["velocity/loser_error"].append(loser)
        return loss + self.args.sft_weight * error.view(-1, 2)[:, 0]
