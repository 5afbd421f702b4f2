"""The loop of all methods that sample groups of videos, score them, and train on them.

Each iteration has two stages.

1. Rollout. For each prompt a group of G videos is sampled. Rewards score them, and each video's advantage is its
   reward relative to its group.
2. Update. The method back-propagates its loss on micro-batches of the rollout. Gradients are averaged over
   processes once per optimizer step.
"""

import contextlib
import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ...policy import Rollout, adapter_values, gathered_values, held_values, norm, parts_of_values
from ...policy.fast.execution import attention_kernel
from ...rewards import RewardTable
from ...rewards.contract import RewardFuncs
from ..auxiliary.auxiliary_loss import AuxiliaryLoss
from ..base._trl import EpochRepeatSampler
from ..base.data.images import group_keys, images_of
from ..base.data.seeds import sample_seed
from ..base.data.video_data import undecoded
from ..base.policy_trainer import VideoPolicyTrainer
from ..base.setup.checks import check_dataset
from ..base.watch.callbacks import AdapterEMA
from ..base.watch.training_metrics import add_recorded
from .advantages import PromptStatistics, group_advantages, group_correlation, nanstd
from .overlap import OverlappedRewards
from .rollout_config import RolloutConfig
from .scored import ScoredRollout

NOISE, STEP, WINDOW, SHUFFLE = range(4)  # purposes of seeds

Metrics = dict[str, list[float | Tensor]]


class RolloutTrainer(VideoPolicyTrainer):
    """Base of the methods that train on rollouts: sampling, rewards, advantages, micro-batches, logs and resume.

    A method overrides

    - `trained_steps`: which denoising steps are stochastic and trained. By default none: sampling is deterministic.
    - `followed`: the averages of the adapter that it needs; and `sampling_policy`: which policy draws the videos.
    - `backward`: its loss.

    Arguments are those of `VideoPolicyTrainer`; `args` is a `RolloutConfig`.
    """

    args: RolloutConfig
    _position_settings = (
        "generation_batch_size",
        "num_generations",
        "steps_per_generation",
        "gradient_accumulation_steps",
        "num_iterations",
    )

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs,
        args: RolloutConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        judge_funcs: RewardFuncs = None,
        peft_config: LoraConfig | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        auxiliary_losses: list[AuxiliaryLoss] | None = None,
    ):
        check_dataset("train_dataset", train_dataset)
        train_dataset = undecoded(train_dataset)
        prompts_per_rollout = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts_per_rollout:
            raise ValueError(
                f"a rollout needs {prompts_per_rollout} different prompts (generation_batch_size "
                f"{args.generation_batch_size} / num_generations {args.num_generations}), but train_dataset has only "
                f"{len(train_dataset)}; add prompts, or lower the batch size."
            )
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            judge_funcs,
            peft_config,
            callbacks,
            auxiliary_losses,
        )
        self.overlapped = None
        if args.overlap_rewards:
            self.overlapped = OverlappedRewards(self.rewards, self.accelerator.device, args.attention_kernel)
        self.scored: ScoredRollout | None = None
        self._rollout_state: dict = {}  # lets a run that is resumed inside the rollout draw it again
        self._resumed_rollout: dict | None = None
        self._warned_of_rewards: set[str] = set()  # reasons already warned of why rewards give no gradient
        self.followers: dict[str, AdapterEMA] = self.followed()
        self.prompt_statistics = (
            PromptStatistics(args.per_prompt_stat_tracking_buffer_size, args.per_prompt_stat_tracking_min_count)
            if args.per_prompt_stat_tracking
            else None
        )

    # --- what a method overrides -------------------------------------------------------------------------------------

    @property
    def kept_together(self) -> int:
        """Number of consecutive videos that must stay in one micro-batch."""
        return 1

    def trained_steps(self, number: int, group: int) -> list[int]:
        """Return the denoising steps that are stochastic and recorded, for a group of rollout `number`."""
        return []

    @property
    def shares_noise(self) -> bool:
        """Whether the videos of a group start from the same noise."""
        return False

    def followed(self) -> dict[str, AdapterEMA]:
        """Return the averages of the adapter that the method needs, by name; checkpoints save and restore them."""
        return {}

    def sampling_policy(self) -> contextlib.AbstractContextManager:
        """Return a context in which the policy is the one that samples; by default the trained one."""
        return contextlib.nullcontext()

    def before_rollout(self) -> None:
        """Called before each rollout except the first, after the last update."""

    def backward(self, scored: ScoredRollout, rows: list[int], count: int) -> tuple[Tensor, Metrics]:
        """Back-propagate the loss of a micro-batch.

        Args:
            scored: the rollout.
            rows: rows of `scored` in the micro-batch.
            count: divisor of the summed losses: the videos of the optimizer step on this process.

        Returns:
            (loss, metrics): a detached scalar, and the values to log.
        """
        raise TypeError(f"{type(self).__name__} has no loss: define backward(scored, rows, count).")

    # --- data: each prompt G times, each rollout's prompts once per micro-batch that uses them -----------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        self.scored = self._resumed_rollout = None
        if not self._step:
            for follower in self.followers.values():  # the user may have set the weights after __init__
                follower.restart()
        self._step += -self._step % self._uses_per_rollout  # a second train() starts with a new rollout
        return super().train(resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            self.train_dataset,
            "Training",
            self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        args = self.args
        sampler = EpochRepeatSampler(
            self.train_dataset if dataset is None else dataset,  # type: ignore[arg-type]
            mini_repeat_count=args.num_generations,
            batch_size=args.generation_batch_size // args.num_generations,
            repeat_count=args.num_iterations * args.steps_per_generation,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )
        sampler.current_epoch = lambda: int(self.state.epoch or 0)  # type: ignore[method-assign]
        return sampler

    @property
    def _uses_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    # --- stage 1: rollout --------------------------------------------------------------------------------------------

    def _generate_and_score(self, inputs: list[dict]) -> None:
        args, number = self.args, self._step // self._uses_per_rollout
        prompts, columns, images = self._columns(inputs)
        clips, drawn_rows = [], []

        def each(rows: list[int], drawn: Tensor) -> None:
            clips.append(drawn)
            drawn_rows.extend(rows)
            if self.overlapped is not None:
                own = {name: [values[r] for r in rows] for name, values in columns.items()}
                self.overlapped.submit([prompts[r] for r in rows], drawn, own, self.state)

        with self.overlapped or contextlib.nullcontext():
            with self.sampling_policy():
                parts = self._sample(prompts, images, each)
                drawn_by = self._weights_in_use()
            videos = torch.cat(clips)
            places = sorted(range(len(prompts)), key=drawn_rows.__getitem__)  # row r was drawn as number places[r]
            if places != list(range(len(places))):
                videos = videos[places]
            # Rewards use the denoiser's attention kernel even without overlap, so that overlap does not change scores.
            with self.stage("rewards"), attention_kernel(args.attention_kernel):
                if self.overlapped is None:
                    table = self.rewards(prompts, videos, columns, self.state)
                else:
                    table = self.overlapped.table(prompts, videos, columns, self.state, places)
        logs_now = args.log_completions and self.state.global_step % self.state.logging_steps == 0
        if logs_now and args.num_sample_videos and self.is_world_process_zero():
            count = min(args.num_sample_videos, len(prompts))
            self.report.write_samples(
                f"samples/rollout_{self.state.global_step:06d}",
                videos[:count].cpu(),
                prompts[:count],
                {n: table.values[:count, i].tolist() for i, n in enumerate(self.rewards.names)},
                "rollout",
                self.state.global_step,
            )

        self.ranks.meet(f"with the rewards of rollout {number}")
        each_part = args.context_parallel  # these processes hold the same videos: take the rewards of the first
        values = self.accelerator.gather(table.values.to(self.accelerator.device)[None])[::each_part]
        values = values.flatten(0, 1).cpu()
        keys = self._keys(prompts, images)
        self._check_groups(keys)
        advantages, rewards, group_std = group_advantages(
            values,
            self.reward_weights,
            args.num_generations,
            scale_rewards=args.scale_rewards,
            aggregation=args.multi_objective_aggregation,
        )
        spread, earlier = (group_std > 0) | (advantages != 0), None
        ranked = spread & ~rewards.isnan()
        if self.prompt_statistics is not None:
            earlier = self.prompt_statistics.state_dict()
            advantages = self.prompt_statistics.advantages(keys, rewards)
            spread = (group_std > 0) | (advantages != 0)
        state = {
            "advantages": advantages.clamp(-args.advantage_clip, args.advantage_clip),
            "spread": spread,
            "ranked": ranked,
            "at": self.state.global_step,
        }
        self._take(parts, state, len(prompts))
        if drawn_by is not None:
            self._rollout_state |= {"weights": drawn_by, "drawn from": self._drawn_from(keys), "statistics": earlier}
        if len(self.rewards) and self.is_world_process_zero():
            self._warn_of_rewards(keys, values.isnan().all(1), spread)
        self._log_rollout(table, values, rewards, group_std)

    def _columns(self, inputs: list[dict]) -> tuple[list[str], dict[str, list], dict[str, list]]:
        """Return the prompts, the other columns and the condition images of a rollout, by row."""
        prompts = [row["prompt"] for row in inputs]
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        return prompts, columns, images_of(columns | {"prompt": prompts}, self.image_columns)

    def _sample(self, prompts: list[str], images: dict[str, list], each: Callable) -> list[tuple[list[int], Rollout]]:
        """Sample this process's share of the current rollout and return it as `ScoredRollout.parts`, without videos.

        each(rows, videos) is called after each pipeline call, in the order of `_calls`.
        """
        args, number = self.args, self._step // self._uses_per_rollout
        first_row = self.data_part * len(prompts)
        ids = range(first_row, first_row + len(prompts))  # rows in the rollout over all processes
        noise_ids = [i // args.num_generations if self.shares_noise else i for i in ids]
        noise_seeds = [sample_seed(args.seed, number, NOISE, i) for i in noise_ids]
        step_seeds = [sample_seed(args.seed, number, STEP, i) for i in ids]
        steps = [self.trained_steps(number, i // args.num_generations) for i in ids]
        parts: dict[tuple[int, ...], list[tuple[list[int], Rollout]]] = {}
        with self.stage("rollout"):
            for rows in _calls(steps, args.rollout_batch_size or len(prompts)):
                samples = self.policy.sample(
                    [prompts[r] for r in rows],
                    noise_seeds=[noise_seeds[r] for r in rows],
                    step_seeds=[step_seeds[r] for r in rows],
                    steps=steps[rows[0]],
                    conditions={name: [own[r] for r in rows] for name, own in images.items()},
                )
                each(rows, samples.videos)
                samples.videos = None  # the update needs only the latents
                parts.setdefault(tuple(steps[rows[0]]), []).append((rows, samples))
        return [
            (list(itertools.chain(*(rows for rows, _ in own))), Rollout.cat([samples for _, samples in own]))
            for own in parts.values()
        ]

    def _weights_in_use(self) -> dict[str, Tensor] | None:
        """Return a copy of the weights that sample this rollout, if a checkpoint may be saved before its last use."""
        if not self.args.reuses_rollouts:
            return None
        return held_values(self.adapter, "cpu")

    def _take(self, parts: list[tuple[list[int], Rollout]], state: dict, count: int) -> None:
        """Set `scored` to this process's share of the rollout, and divide its rows into micro-batches."""
        args, number = self.args, self._step // self._uses_per_rollout
        first_row = self.data_part * count
        order = torch.arange(count)
        if args.steps_per_generation > 1:
            # Ranks that share weights must make the same calls, so they shuffle with the same seed.
            part = () if self.policy.mesh is not None else (self.data_part,)
            seed = sample_seed(args.seed, number, SHUFFLE, *part)
            unit = self.kept_together
            order = torch.randperm(count // unit, generator=torch.Generator().manual_seed(seed))
            order = (order[:, None] * unit + torch.arange(unit)).flatten()
        own = slice(first_row, first_row + count)
        self._rollout_state = state
        self.scored = ScoredRollout(
            parts,
            state["advantages"][own],
            state["spread"][own],
            state.get("ranked", state["spread"])[own],
            number,
            state["at"],
            first_row,
            [rows.tolist() for rows in order.chunk(args.steps_per_generation)],
        )

    def _draw_again(self, inputs: list[dict], state: dict) -> None:
        """Sample the rollout in which a run was interrupted again, with the weights that drew it; keep its rewards.

        If the data or a sampling setting has changed, sample and score a new rollout instead.
        """
        prompts, _, images = self._columns(inputs)
        if state.get("drawn from") != self._drawn_from(self._keys(prompts, images)):
            if self.prompt_statistics is not None and state.get("statistics") is not None:
                self.prompt_statistics.load_state_dict(state["statistics"])
            self._generate_and_score(inputs)
            return
        with adapter_values(self.adapter, state["weights"]):
            parts = self._sample(prompts, images, lambda rows, videos: None)
        self._take(parts, state, len(prompts))

    def _keys(self, prompts: list[str], images: dict[str, list]) -> list[str]:
        """Return the `group_keys` of all videos of the rollout, over all processes."""
        together = self.args.context_parallel
        return [key for own in gather_object([group_keys(prompts, images)])[::together] for key in own]

    def _drawn_from(self, keys: list[str]) -> str:
        """Return a digest of everything except the weights that a rollout's videos depend on."""
        args = self.args
        drawn_from = keys, args.seed, self.shares_noise, sorted(args.policy_settings().items())
        return hashlib.sha256(repr(drawn_from).encode()).hexdigest()

    def _check_groups(self, keys: list[str]) -> None:
        size = self.args.num_generations
        for start in range(0, len(keys), size):
            if len(set(keys[start : start + size])) != 1:
                raise RuntimeError(
                    f"group {start // size} mixes prompts {set(keys[start : start + size])}. If a transform of "
                    "train_dataset (set_transform) changes prompts or images at random, do that in dataset.map "
                    "instead: a transform runs again for each video of a group."
                )

    def _warn_of_rewards(self, keys: list[str], unscored: Tensor, spread: Tensor) -> None:
        """Warn about a prompt whose rewards give no gradient, once per run for each reason."""
        size, warning = self.args.num_generations, {}
        if unscored.any():
            warning["unscored"] = (
                f"no reward applies to {int(unscored.sum())} of a rollout's {len(keys)} videos (all returned None), "
                f"the first for prompt {keys[int(unscored.nonzero()[0])]!r}, so nothing is learnt from them. Add a "
                "reward for these prompts, or remove them from train_dataset."
            )
        equal = (~spread).view(-1, size).all(1).nonzero().flatten().tolist()
        if equal:
            further = f" The same holds for {len(equal) - 1} more of this rollout's {len(keys) // size} prompts."
            warning["equal"] = (
                f"all videos of prompt {keys[equal[0] * size]!r} have the same reward, or none, so nothing is learnt "
                f"from them.{further if len(equal) > 1 else ''} If this holds for all prompts of a rollout and no "
                "other loss term has a gradient, the optimizer step is skipped. The metric frac_reward_zero_std is "
                "the share of such groups."
            )
        for reason in warning.keys() - self._warned_of_rewards:
            self._warned_of_rewards.add(reason)
            warnings.warn(warning[reason], stacklevel=2)

    def _log_rollout(self, table: RewardTable, values: Tensor, rewards: Tensor, group_std: Tensor) -> None:
        metrics = self._metrics["train"]
        for i, name in enumerate(self.rewards.names):
            metrics[f"rewards/{name}/mean"].append(values[:, i].nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(values[:, i]).item())
            metrics[f"seconds/rewards/{name}"].append(table.seconds[name])
        metrics["reward"].append(rewards.nanmean().item())
        metrics["reward_std"].append(nanstd(rewards).item())
        metrics["frac_reward_zero_std"].append((group_std == 0).float().mean().item())
        correlation = group_correlation(values, self.args.num_generations)
        for (i, a), (j, b) in itertools.combinations(enumerate(self.rewards.names), 2):
            if not correlation[i, j].isnan():
                metrics[f"reward_correlation/{a}/{b}"].append(correlation[i, j].item())
        add_recorded(metrics, table)

    # --- stage 2: update ---------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        start = time.perf_counter()
        use = self._step % self._uses_per_rollout
        if self.scored is None and use and self._resumed_rollout is not None:
            self._draw_again(inputs, self._resumed_rollout)
        elif self.scored is None or use == 0:
            if self._step:
                self.before_rollout()
            self._generate_and_score(inputs)
        rows = self.scored.micro_batches[self._step % self.args.steps_per_generation]
        with self.stage("update"):
            loss, metrics = self.backward(self.scored, rows, len(rows) * self.current_gradient_accumulation_steps)
        for name, values in metrics.items():
            self._metrics["train"][name] += values
        loss += self.backward_auxiliary_losses()
        with self.stage("update"):
            if self.accelerator.sync_gradients:
                self.policy.check_replays()
                self.all_reduce_gradients()
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - start)
        return loss

    @contextlib.contextmanager
    def logged_gradient(self, index: int) -> Iterator[None]:
        """Log the norm of the gradient that one denoising step adds inside this context."""
        parameters = list(self.adapter.values())
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        yield
        fresh = [p.grad for p in parameters if p.grad is not None]
        if fresh:
            self._metrics["train"][f"grad_norm/step_{index}"].append(norm(fresh))
        for parameter, earlier in zip(parameters, before):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)

    # --- resume ------------------------------------------------------------------------------------------------------

    def _averages(self) -> dict[str, AdapterEMA]:
        return super()._averages() | self.followers

    def _extra_state(self) -> dict:
        statistics = None if self.prompt_statistics is None else self.prompt_statistics.state_dict()
        unfinished = None
        if self._step % self._uses_per_rollout:
            unfinished = dict(self._rollout_state)
            if "weights" in unfinished:
                unfinished["weights"] = gathered_values(unfinished["weights"], self.adapter)
        return super()._extra_state() | {"prompt_statistics": statistics, "rollout": unfinished}

    def _load_extra_state(self, state: dict) -> None:
        super()._load_extra_state(state)
        self.scored, self._resumed_rollout = None, state.get("rollout")
        if self._resumed_rollout is not None and "weights" in self._resumed_rollout:
            self._resumed_rollout["weights"] = parts_of_values(self._resumed_rollout["weights"], self.adapter)
        if self.prompt_statistics is not None and state["prompt_statistics"] is not None:
            self.prompt_statistics.load_state_dict(state["prompt_statistics"])


def _calls(steps: list[list[int]], size: int) -> Iterator[list[int]]:
    """Yield the rows of each pipeline call: at most `size`, with the same trained steps, in order of appearance."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, own in enumerate(steps):
        alike.setdefault(tuple(own), []).append(row)
    for rows in alike.values():
        for first in range(0, len(rows), size):
            yield rows[first : first + size]
