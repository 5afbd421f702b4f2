"""Flow-DPO: preferences between two videos of a prompt (arXiv 2501.13918, after Diffusion-DPO, arXiv 2311.12908)."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...estimate import Held
from ...policy import Rollout
from ...transitions import Paper
from ..base.data.pairs import SIDES, check_pairs, pair_of
from ..base.data.seeds import sample_seed
from ..base.data.video_data import undecoded
from ..base.setup.checks import check_dataset
from ..rollouts.rollout_trainer import Metrics
from ..rollouts.scored import ScoredRollout
from .forward_process import ForwardProcessConfig, ForwardProcessTrainer, Noised

VIDEO = 40  # what a seed is for
#: Settings of rollouts and rewards, of which there are none beside pairs.
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
    """Settings of [`FlowDPOTrainer`]. A micro-batch holds whole groups; of each, two videos are trained on.

    With pairs from a data set a group is a pair: `num_generations` is 2. `scale_rewards` and `advantage_clip` are
    refused: only the order of a group's rewards counts.
    """

    without_effect: ClassVar[dict[str, str]] = dict.fromkeys(
        ("scale_rewards", "advantage_clip"),
        "Flow-DPO takes the best and the worst of a group: only the order of a group's rewards counts; leave it out.",
    )
    small_group: ClassVar[int] = 2  # no advantage's sign counts
    beta: float = field(
        default=500.0, metadata={"help": "Strength of the tie to the reference, as in DPO: the larger, the nearer."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the adapter."})
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of mean (v - v*)^2 of the preferred video, against the likelihood of both falling."},
    )
    advantage_clip: float = field(
        default=math.inf, metadata={"help": "Not used: a clip could make the best and the second best equal."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive: it scales the preference.")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight={self.sft_weight} must not be negative; 0 leaves the term out.")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be a multiple of "
                f"num_generations={self.num_generations}: the two videos of a pair are trained on together."
            )

    def held(self) -> Held:
        return replace(super().held(), trained=2 * self.per_device_train_batch_size // self.num_generations)


def preference_loss(error: Tensor, reference_error: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of pairs, whose rows are winner, loser, winner, loser ...

        margin = - beta / 2 [ (l - l_ref)(winner) - (l - l_ref)(loser) ],     L = -log sigmoid(margin)

    with l = mean (v - v*)^2 at the same t and e for both.

    Args:
        error, reference_error: (2 P,) of the trained policy, with gradients, and of the reference.

    Returns:
        (loss, margin): (P,) each.
    """
    winner, loser = (error - reference_error).view(-1, 2).unbind(1)
    margin = -beta / 2 * (winner - loser)
    return -logsigmoid(margin), margin


class FlowDPOTrainer(ForwardProcessTrainer):
    r"""Trains a LoRA adapter by direct preference optimisation of a flow (arXiv 2501.13918).

        L = preference_loss + sft_weight mean (v - v*)^2 (winner)

    Online, with rewards: the best against the worst video of each rollout's group; a group of equal rewards gets no
    step. Offline, where train_dataset has columns `chosen` and `rejected`: pairs of videos for each `prompt`, each a
    path, the bytes of a file, a `datasets.Video` or a tensor (F, 3, H, W); then there are no rewards.

    Arguments are those of `VideoPolicyTrainer`; `args` is a `FlowDPOConfig`.
    """

    _tag_names = ["trl", "dpo", "text-to-video", "pisces_rl"]
    _name = "Flow-DPO"
    papers = (
        Paper("2501.13918", "Improving Video Generation with Human Feedback"),
        Paper("2311.12908", "Diffusion Model Alignment Using Direct Preference Optimization"),
    )

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, *further, **keywords):
        args = FlowDPOConfig() if args is None else args
        check_dataset("train_dataset", train_dataset)
        train_dataset = undecoded(train_dataset)
        self.offline = bool(set(SIDES) & set(train_dataset.column_names))
        self._may_lack_rewards = self.offline
        if not self.offline and (reward_funcs is None or reward_funcs == []):
            raise ValueError(
                "reward_funcs is empty, and train_dataset has no columns `chosen` and `rejected`, only "
                f"{train_dataset.column_names}: pass rewards, which prefer the best of each group's videos to the "
                "worst, or pairs of videos in these columns."
            )
        if self.offline:
            check_pairs(train_dataset)
            if reward_funcs is not None and reward_funcs != []:
                raise ValueError(
                    "reward_funcs is given, but train_dataset holds pairs (chosen, rejected): the pairs are what is "
                    "learnt from. Leave reward_funcs out, or remove these columns; judge_funcs measure in any case."
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
        """Both videos of a pair have the same noise: their group's."""
        return row // self.args.num_generations

    # --- pairs of a data set -----------------------------------------------------------------------------------------

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
        advantages = torch.tensor([1.0, -1.0]).repeat(whole // 2)  # every pair comes twice: chosen, rejected
        self._take(
            [(list(range(len(prompts))), videos)],
            state | {"advantages": advantages, "spread": advantages != 0},
            len(prompts),
        )

    def _encoded(self, inputs: list[dict], prompts: list[str], images: dict[str, list]) -> Rollout:
        """The pairs as a rollout: their clean latents."""
        codec = self.policy.latent_codec({name: own[:1] for name, own in images.items()})
        pairs = (pair_of(first, codec.video[0]) for first in inputs[::2])  # one at a time in the memory of the VAE
        latents = [
            codec.encode(self.policy.pipeline, torch.stack([codec.fitted(video) for video in pair])) for pair in pairs
        ]
        seeds = [sample_seed(self.args.seed, VIDEO, self._step, row) for row in range(len(prompts))]
        return Rollout(prompts, seeds, None, [], conditions=images, clean=torch.cat(latents))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def taught(self, scored: ScoredRollout, rows: list[int]) -> tuple[list[int], Tensor]:
        """Rows winner, loser, ... of the P groups that are taken, the best and the worst of those that have a reward;
        and (P,) weights: G, since of a group's G videos one pair is trained on, or 0 where none is better."""
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
        """(P,) for rows winner, loser, ..."""
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
