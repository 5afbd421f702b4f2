"""Evaluation during training: deterministic samples from fixed noise, scored by rewards and judges."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState

from ....policy import VideoPolicy
from ....rewards import RewardPanel, RewardTable
from ...rollouts.advantages import aggregate_rewards
from ..data.images import images_of
from ..data.seeds import sample_seed
from ..distributed.ranks import Ranks
from ..watch.training_metrics import check_recorded


class Scored(NamedTuple):
    """Results of evaluating a dataset of n prompts.

    Attributes:
        prompts: the prompts, in order.
        scores: per-sample scores {name: n values or None}.
        recorded: means of the scalars that rewards recorded.
        videos: on rank 0, the first videos (B, F, 3, H, W) on the CPU.
    """

    prompts: list[str]
    scores: dict[str, list[float | None]]
    recorded: dict[str, float]
    videos: Tensor | None

    def means(self) -> dict[str, float]:
        """Return the recorded scalars, and the mean of each score over the samples that have it."""
        means = dict(self.recorded)
        for name, values in self.scores.items():
            known = [v for v in values if v is not None]
            if known:
                means[name if name == "reward" else f"{name}/mean"] = float(np.mean(known))
        return means


class Evaluator:
    """Samples datasets from noise that depends only on `args.eval_seed` and the row, and scores the videos.

    Args:
        policy: the policy to sample.
        rewards: rewards that score the videos.
        judges: judges that score them.
        reward_weights: (R,) weights of the rewards.
        image_columns: dataset columns that condition the pipeline.
        ranks: the processes; each takes a consecutive share of the rows.
        progress: called with a text that shows the progress.
        args: a config.
    """

    def __init__(
        self,
        policy: VideoPolicy,
        rewards: RewardPanel,
        judges: RewardPanel,
        reward_weights: Tensor,
        image_columns: list[str],
        ranks: Ranks,
        progress: Callable[[str], None],
        args,
    ):
        self.policy, self.rewards, self.judges, self.reward_weights = policy, rewards, judges, reward_weights
        self.image_columns, self.ranks, self.progress, self.args = image_columns, ranks, progress, args

    def noise(self, row: int) -> int:
        return sample_seed(self.args.eval_seed, row)

    def sample(self, rows: list[int], part: dict[str, list]) -> Tensor:
        """Sample the videos of some rows of a dataset, whose columns are `part`."""
        images = images_of(part, self.image_columns)
        noise = [self.noise(row) for row in rows]
        return self.policy.sample(list(part["prompt"]), noise_seeds=noise, conditions=images).videos

    def evaluate(self, name: str, dataset: Dataset, state: TrainerState) -> Scored:
        """Sample and score a dataset on all processes; `state` is passed to the rewards."""
        args, process = self.args, self.ranks.accelerator.process_index
        rank = process // args.context_parallel
        share = -(-len(dataset) // args.data_parts)
        own = list(range(min(rank * share, len(dataset)), min((rank + 1) * share, len(dataset))))
        count = len(own)
        if self.policy.mesh is not None:  # all ranks must make the same calls, so the last pads its share, unscored
            own += [len(dataset) - 1] * (share - count)
        batch = args.per_device_eval_batch_size
        rows, kept, recorded = [], [], []
        for start in range(0, len(own), batch):
            self.progress(f"evaluation {name} {100 * start // max(len(own), 1)}%")
            indices = own[start : start + batch]
            part = dataset[indices]
            videos = self.sample(indices, part)
            indices = indices[: max(0, count - start)]
            if not indices:
                continue
            videos, part = videos[: len(indices)], {key: values[: len(indices)] for key, values in part.items()}
            scores, metrics = self._score(part.pop("prompt"), videos, part, state)
            if process % args.context_parallel:  # the first process of the group reports these
                continue
            recorded += [(key, value, len(indices)) for key, values in metrics.items() for value in values]
            rows += [(i, {k: v[j] for k, v in scores.items()}) for j, i in enumerate(indices)]
            if rank == 0 and len(kept) < args.num_sample_videos:
                kept += list(videos.cpu()[: args.num_sample_videos - len(kept)])
        self.ranks.meet(f"in the evaluation of {name!r}")
        rows = [row for _, row in sorted(gather_object(rows), key=lambda r: r[0])]
        names = list(dict.fromkeys(key for row in rows for key in row))
        totals: dict[str, list[float]] = {}
        for key, value, count in gather_object(recorded):
            total = totals.setdefault(key, [0.0, 0.0])
            total[0] += value * count
            total[1] += count
        return Scored(
            list(dataset["prompt"]),
            {key: [row.get(key) for row in rows] for key in names},
            {key: total / count for key, (total, count) in totals.items()},
            torch.stack(kept) if kept else None,
        )

    def _score(self, prompts: list[str], videos: Tensor, columns: dict, state: TrainerState) -> tuple[dict, dict]:
        """Return (per-sample scores, metrics): weighted reward, each reward, each judge, and recorded values."""
        table = self.rewards(prompts, videos, columns, state)
        scores = {"reward": _with_none(aggregate_rewards(table.values, self.reward_weights))}
        scores |= {f"rewards/{n}": _with_none(table.values[:, i]) for i, n in enumerate(self.rewards.names)}
        if len(self.judges):
            judged = self.judges(prompts, videos, columns, state)
            scores |= {f"judges/{n}": _with_none(judged.values[:, i]) for i, n in enumerate(self.judges.names)}
            count, judges = len(self.rewards), len(self.judges)
            table = RewardTable.side_by_side([table, judged], [range(count), range(count, count + judges)])
        check_recorded(table)
        for key, values in table.extras.items():
            if all(v is None or isinstance(v, (bool, int, float)) for v in values):
                scores[key] = [None if v is None else float(v) for v in values]
        return scores, table.metrics

    def before_and_after(self, dataset: Dataset, untrained, trained) -> tuple[Tensor, Tensor]:
        """Sample the first rows before and after training, from the same noise.

        Args:
            dataset: an evaluation set.
            untrained: a context in which the policy has its initial weights.
            trained: a context in which it has the weights that are saved.

        Returns:
            (before, after): videos on the CPU.
        """
        part = dataset[: self.args.num_sample_videos]
        rows = list(range(len(part["prompt"])))
        with untrained:
            base = self.sample(rows, part).cpu()
        with trained:
            return base, self.sample(rows, part).cpu()


def means_of_sets(scored: dict[str, Scored], prefix: str, several: bool) -> dict[str, float]:
    """Return {prefix_METRIC: mean} or, for `several` sets, {prefix_SET_METRIC: mean} and the mean of their rewards."""
    if not several:
        (one,) = scored.values()
        return {f"{prefix}_{key}": mean for key, mean in one.means().items()}
    means = {name: part.means() for name, part in scored.items()}
    metrics = {f"{prefix}_{name}_{key}": mean for name, own in means.items() for key, mean in own.items()}
    rewards = [
        own["reward"] for own in means.values() if "reward" in own
    ]  # absent if it applies to no prompt of a set
    return metrics | ({f"{prefix}_reward": float(np.mean(rewards))} if rewards else {})


def _with_none(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]
