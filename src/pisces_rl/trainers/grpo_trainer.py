"""GRPO for text-to-video policies.

Each iteration has two stages.

1. Rollout. For every prompt a group of G videos is sampled, with noise at the trained denoising steps; rewards score
   them, and each video's advantage is its reward against its group's.
2. Update. The recorded transitions are scored again under the current adapter, step by step; each step's clipped loss
   is back-propagated at once, so that one step's graph lives at a time. Gradients are averaged over processes once
   per optimizer step.

The method is Flow-GRPO's (arXiv 2505.05470) and DanceGRPO's (arXiv 2505.07818); with `transition="ddim"` it is DDPO's
policy gradient (arXiv 2305.13301) with group advantages. The structure and names follow TRL's `GRPOTrainer`.
"""

import contextlib
import hashlib
import itertools
import time
import warnings

import torch
from accelerate.utils import gather_object

from ..policy import ReplayStep, Rollout, adapter_values
from ..policy.execution import attention_kernel
from ..transitions import Paper
from ._trl import EpochRepeatSampler
from .advantages import PromptStatistics, group_advantages, group_correlation, nanstd
from .base import VideoPolicyTrainer
from .checks import check_dataset
from .grpo_config import VideoGRPOConfig
from .images import group_keys, images_of
from .losses import (
    clip_fractions,
    clipped_policy_loss,
    guarded_log_ratio,
    kl_to_reference,
    prediction_distance,
    step_weight,
)
from .metrics import add_recorded
from .overlap import OverlappedRewards
from .seeds import sample_seed

NOISE, STEP, WINDOW, SHUFFLE = range(4)  # what a seed is for


class VideoGRPOTrainer(VideoPolicyTrainer):
    r"""Trains a LoRA adapter of a text-to-video pipeline by group-relative policy optimisation.

    For a group of G videos of one prompt with rewards r_i, A_i = (r_i - mean) / (std + 1e-4); for each trained
    denoising step t, with rho = p(x' | x) / p_old(x' | x),

        L = mean over samples and steps of  max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL(p || p_ref)

    The reference policy is the model with its adapter switched off.

    Example:

    ```python
    from datasets import Dataset
    from pisces_rl import VideoGRPOConfig, VideoGRPOTrainer

    def brightness(prompts, videos, **columns):
        return videos.mean(dim=(1, 2, 3, 4)).tolist()

    trainer = VideoGRPOTrainer(
        model="tiny-wan",
        reward_funcs=brightness,
        args=VideoGRPOConfig(output_dir="bright", max_steps=10, height=64, width=64, num_frames=17),
        train_dataset=Dataset.from_dict({"prompt": ["a red circle", "two blue squares"]}),
    )
    trainer.train()
    ```

    Arguments are those of `VideoPolicyTrainer`; `args` is a `VideoGRPOConfig`.
    """

    _tag_names = ["trl", "grpo", "text-to-video", "pisces_rl"]
    _name = "Video GRPO"
    papers = (
        Paper("2402.03300", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"),
    )
    _counts_memory = True
    _position_settings = ("generation_batch_size", "num_generations", "steps_per_generation",
                          "gradient_accumulation_steps", "num_iterations")

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, judge_funcs=None,
                 peft_config=None, callbacks=None, video_dataset=None):
        args = VideoGRPOConfig() if args is None else args
        check_dataset("train_dataset", train_dataset)
        prompts_per_rollout = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts_per_rollout:
            raise ValueError(
                f"a rollout takes {prompts_per_rollout} different prompts (generation_batch_size "
                f"{args.generation_batch_size} / num_generations {args.num_generations}), but train_dataset has only "
                f"{len(train_dataset)}; add prompts, or lower the batch size."
            )
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, judge_funcs, peft_config, callbacks,
                         video_dataset)
        self.overlapped = None
        if args.overlap_rewards:
            self.overlapped = OverlappedRewards(self.rewards, self.accelerator.device, args.attention_kernel)
        self._rollout: Rollout | None = None
        self._rollout_at = -1  # optimizer step at which it was drawn
        self._rollout_state: dict = {}  # what draws it again in a run that is resumed inside it
        self._resumed_rollout: dict | None = None
        self._advantages: torch.Tensor | None = None
        self._micro_batches: list[list[int]] = []
        self.prompt_statistics = PromptStatistics(
            args.per_prompt_stat_tracking_buffer_size, args.per_prompt_stat_tracking_min_count
        ) if args.per_prompt_stat_tracking else None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        self._rollout = self._resumed_rollout = None
        self._step += -self._step % self._uses_per_rollout  # a second train() begins with a rollout of its own
        return super().train(resume_from_checkpoint, **kwargs)

    # --- data: every prompt G times, every rollout's prompts for as many micro-batches as it is used -----------------

    def get_train_dataloader(self):
        return self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler, is_training=True,
        )

    def _get_train_sampler(self, dataset=None):
        args = self.args
        sampler = EpochRepeatSampler(
            self.train_dataset if dataset is None else dataset, mini_repeat_count=args.num_generations,
            batch_size=args.generation_batch_size // args.num_generations,
            repeat_count=args.num_iterations * args.steps_per_generation, shuffle=args.shuffle_dataset, seed=args.seed,
        )
        sampler.current_epoch = lambda: int(self.state.epoch or 0)
        return sampler

    @property
    def _uses_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    # --- stage 1: rollout --------------------------------------------------------------------------------------------

    def _generate_and_score(self, inputs: list[dict]) -> None:
        args, generation = self.args, self._step // self._uses_per_rollout
        prompts, columns, images = self._columns(inputs)

        def submit(part: slice, videos: torch.Tensor) -> None:
            if self.overlapped is not None:
                own = {name: values[part] for name, values in columns.items()}
                self.overlapped.submit(prompts[part], videos, own, self.state)

        with self.overlapped or contextlib.nullcontext():
            self._rollout = self._sample(prompts, images, submit)
            # Also where nothing overlaps, rewards have the denoiser's attention kernel.
            with self.stage("rewards"), attention_kernel(args.attention_kernel):
                score = self.rewards if self.overlapped is None else self.overlapped.table
                table = score(prompts, self._rollout.videos, columns, self.state)
        logs_now = args.log_completions and self.state.global_step % self.state.logging_steps == 0
        if logs_now and args.num_sample_videos and self.is_world_process_zero():
            count = min(args.num_sample_videos, len(prompts))
            self._write_samples(
                f"samples/rollout_{self.state.global_step:06d}", self._rollout.videos[:count].cpu(), prompts[:count],
                {n: table.values[:count, i].tolist() for i, n in enumerate(self.rewards.names)}, tag="rollout",
            )
        self._rollout.videos = None  # scored; the update needs the states only

        self.ranks.meet(f"with the rewards of rollout {generation}")
        each = args.context_parallel  # processes that have the same videos; the first one's rewards are all theirs
        values = self.accelerator.gather(table.values.to(self.accelerator.device)[None])[::each].flatten(0, 1).cpu()
        keys = self._keys(prompts, images)
        self._check_groups(keys)
        advantages, rewards, group_std = group_advantages(
            values, self.reward_weights, args.num_generations, scale_rewards=args.scale_rewards,
            aggregation=args.multi_objective_aggregation,
        )
        earlier = None
        if self.prompt_statistics is not None:
            earlier = self.prompt_statistics.state_dict()
            advantages = self.prompt_statistics.advantages(keys, rewards)
        self._rollout_at = self.state.global_step
        self._take_advantages(advantages.clamp(-args.advantage_clip, args.advantage_clip), len(prompts))
        if self._uses_per_rollout > args.gradient_accumulation_steps:  # checkpoints may lie inside it
            weights = {name: p.detach().to("cpu", copy=True) for name, p in self.adapter.items()}
            self._rollout_state |= {"weights": weights, "drawn from": self._drawn_from(keys), "statistics": earlier}
        self._log_rollout(table, values, rewards, group_std)

    def _columns(self, inputs: list[dict]) -> tuple[list[str], dict[str, list], dict[str, list]]:
        """A rollout's prompts, further columns, and images of the pipeline, by row."""
        prompts = [row["prompt"] for row in inputs]
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        return prompts, columns, images_of(columns | {"prompt": prompts}, self.image_columns)

    def _sample(self, prompts: list[str], images: dict[str, list], each) -> Rollout:
        """This process's share of the present rollout; each(rows, videos) is called for every part that is ready."""
        args, generation = self.args, self._step // self._uses_per_rollout
        first_row = self.data_part * len(prompts)
        ids = range(first_row, first_row + len(prompts))  # row in the rollout over all processes
        noise_ids = [i // args.num_generations if args.share_initial_noise else i for i in ids]
        noise_seeds = [sample_seed(args.seed, generation, NOISE, i) for i in noise_ids]
        step_seeds = [sample_seed(args.seed, generation, STEP, i) for i in ids]
        steps = self.policy.draw_window(sample_seed(args.seed, generation, WINDOW))
        parts, chunk = [], args.rollout_batch_size or len(prompts)
        with self.stage("rollout"):
            for start in range(0, len(prompts), chunk):
                part = slice(start, start + chunk)
                parts.append(self.policy.sample(prompts[part], noise_seeds=noise_seeds[part],
                                                step_seeds=step_seeds[part], steps=steps,
                                                conditions={name: own[part] for name, own in images.items()}))
                each(part, parts[-1].videos)
        return Rollout.cat(parts)

    def _take_advantages(self, advantages: torch.Tensor, count: int) -> None:
        """This process's of those of the whole rollout, and the rows of its micro-batches."""
        args, generation = self.args, self._step // self._uses_per_rollout
        self._rollout_state = {"advantages": advantages, "at": self._rollout_at}
        self._advantages = advantages[self.data_part * count:(self.data_part + 1) * count]
        order = torch.arange(count)
        if args.steps_per_generation > 1:
            seed = sample_seed(args.seed, generation, SHUFFLE, self.data_part)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self._micro_batches = [rows.tolist() for rows in order.chunk(args.steps_per_generation)]

    def _draw_again(self, inputs: list[dict], state: dict) -> None:
        """The rollout inside which a run was resumed, under the weights that drew it; its rewards are known.

        Where the data or a setting of sampling has changed it is another rollout, and scored as one.
        """
        prompts, _, images = self._columns(inputs)
        if state.get("drawn from") != self._drawn_from(self._keys(prompts, images)):
            if self.prompt_statistics is not None and state.get("statistics") is not None:
                self.prompt_statistics.load_state_dict(state["statistics"])
            self._generate_and_score(inputs)
            return
        with adapter_values(self.adapter, state["weights"]):
            self._rollout = self._sample(prompts, images, lambda rows, videos: None)
        self._rollout.videos, self._rollout_at = None, state["at"]
        self._take_advantages(state["advantages"], len(prompts))
        self._rollout_state = state

    def _keys(self, prompts: list[str], images: dict[str, list]) -> list[str]:
        """What the group of each video of the whole rollout has in common, see `group_keys`."""
        together = self.args.context_parallel
        return [key for own in gather_object([group_keys(prompts, images)])[::together] for key in own]

    def _drawn_from(self, keys: list[str]) -> str:
        """A digest of all that a rollout's videos depend on besides the weights."""
        args = self.args
        drawn_from = keys, args.seed, args.share_initial_noise, sorted(args.policy_settings().items())
        return hashlib.sha256(repr(drawn_from).encode()).hexdigest()

    def _check_groups(self, keys: list[str]) -> None:
        size = self.args.num_generations
        for start in range(0, len(keys), size):
            if len(set(keys[start:start + size])) != 1:
                raise RuntimeError(
                    f"group {start // size} mixes prompts {set(keys[start:start + size])}. A transform of "
                    "train_dataset that draws gives each video of a group another prompt: draw in dataset.map."
                )

    def _log_rollout(self, table, values, rewards, group_std) -> None:
        metrics = self._metrics["train"]
        unscored = int(values.isnan().all(1).sum())
        if unscored and len(self.rewards) and self.is_world_process_zero():
            warnings.warn(
                f"no reward applies to {unscored} of a rollout's {len(values)} videos (all returned None): they teach "
                "nothing. Reward their prompts, or leave them out of train_dataset.", stacklevel=2,
            )
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

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        start = time.perf_counter()
        use = self._step % self._uses_per_rollout
        if self._rollout is None and use and self._resumed_rollout is not None:
            self._draw_again(inputs, self._resumed_rollout)
        elif self._rollout is None or use == 0:
            self._generate_and_score(inputs)
        rows = self._micro_batches[self._step % self.args.steps_per_generation]
        with self.stage("update"):
            loss = self._update(rows, before_first_step=self.state.global_step == self._rollout_at)
        loss += self._distil()
        with self.stage("update"):
            if self.accelerator.sync_gradients:
                self.policy.check_replays()
                self.all_reduce_gradients()
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - start)
        return loss

    def _update(self, rows: list[int], before_first_step: bool) -> torch.Tensor:
        """Back-propagate the loss of one micro-batch, one denoising step at a time; returns its value."""
        args, rollout, metrics = self.args, self._rollout, self._metrics["train"]
        batch_size = len(rows)
        # Without a KL term a sample of advantage 0 has no gradient; but ranks that share weights make the same calls.
        if not args.beta and self.policy.mesh is None:
            rows = [r for r in rows if self._advantages[r] != 0]
        total, errors = torch.zeros((), device=self.accelerator.device), []
        if not rows:
            for name in ("low_mean", "high_mean", "region_mean"):
                metrics[f"clip_ratio/{name}"] += [0.0] * len(rollout.steps)
            return total
        device = self.accelerator.device
        advantages, old_log_probs = self._advantages[rows].to(device), rollout.log_probs[rows]
        places = {row: place for place, row in enumerate(rows)}
        reference = self._reference_steps(rows) if args.beta else {}
        epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        share = len(rows) / batch_size

        def visit(step: ReplayStep) -> None:
            nonlocal total
            k = rollout.steps.index(step.index)
            own = slice(places[step.rows[0]], places[step.rows[-1]] + 1)  # a visit is of neighbouring rows
            log_ratio, advantage = step.log_prob - old_log_probs[own, k], advantages[own]
            if before_first_step:
                errors.append((step.index, log_ratio.detach().abs().max()))
            weight = step_weight(args.step_weighting, step.std, step.gain, step.step_size)
            if args.step_weighting == "guard":
                old_mean = rollout.means[step.index][rollout.state_rows(step.rows)]
                log_ratio = guarded_log_ratio(log_ratio, step.mean, old_mean, step.std, rollout.rows_per_video)
            loss = weight * clipped_policy_loss(log_ratio, advantage, args.epsilon, epsilon_high)
            if args.beta:
                expected = reference[step.index, step.rows[0]]
                if args.kl_space == "x":
                    kl = kl_to_reference(step.mean, expected.mean, step.std, rollout.rows_per_video)
                else:
                    kl = prediction_distance(step.prediction, expected.prediction, rollout.rows_per_video)
                loss = loss + args.beta * kl
                metrics["kl"].append(kl.detach().mean())
            loss = loss.sum() / (batch_size * len(rollout.steps) * self.current_gradient_accumulation_steps)
            with self._logged_gradient(step.index):
                self.accelerator.backward(loss)
            total = total + loss.detach()
            low, high = clip_fractions(log_ratio, advantage, args.epsilon, epsilon_high)
            metrics["clip_ratio/low_mean"].append(low * share)
            metrics["clip_ratio/high_mean"].append(high * share)
            metrics["clip_ratio/region_mean"].append((low + high) * share)
            metrics["ratio/mean"].append(log_ratio.detach().exp().mean())
            metrics["ratio/max_deviation"].append((log_ratio.detach().exp() - 1).abs().max())

        self.policy.replay(rollout, rows, visit, wait=False)
        self._check_replay(errors)
        return total

    def _reference_steps(self, rows: list[int]) -> dict[tuple[int, int], ReplayStep]:
        """The trained steps under the reference policy, by index and first row, without gradients."""
        steps: list[ReplayStep] = []
        with self.initial.reference():
            self.policy.replay(self._rollout, rows, steps.append, grad=False, wait=False)
        return {(step.index, step.rows[0]): step for step in steps}

    def _check_replay(self, errors: list[tuple[int, torch.Tensor]]) -> None:
        """Before the first optimizer step the ratio must be 1: rollout and update are the same computation.

        Args:
            errors: a denoising step and its largest |log p - log p_old|, each.
        """
        for index, error in errors:
            error = error.item()
            self._metrics["train"]["replay/max_log_prob_error"].append(error)
            if not error <= self.args.replay_tolerance:
                raise RuntimeError(
                    f"denoising step {index}: log p differs by {error:.3g} between sampling and update, before any "
                    f"optimizer step (replay_tolerance {self.args.replay_tolerance:g}). The update would follow "
                    "numerical noise. Use the same attention kernel and compilation in both, fp32 or bf16 throughout, "
                    "and no feature cache; or raise replay_tolerance if this error is small beside the clip range."
                )

    @contextlib.contextmanager
    def _logged_gradient(self, index: int):
        """Logs the norm of the gradient that one denoising step contributes."""
        parameters = list(self.adapter.values())
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        yield
        fresh = [p.grad for p in parameters if p.grad is not None]
        if fresh:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(fresh)))
            self._metrics["train"][f"grad_norm/step_{index}"].append(norm)
        for parameter, earlier in zip(parameters, before):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)

    # --- resume ------------------------------------------------------------------------------------------------------

    def _extra_state(self) -> dict:
        statistics = None if self.prompt_statistics is None else self.prompt_statistics.state_dict()
        unfinished = self._rollout_state if self._step % self._uses_per_rollout else None
        return super()._extra_state() | {"prompt_statistics": statistics, "rollout": unfinished}

    def _load_extra_state(self, state: dict) -> None:
        super()._load_extra_state(state)
        self._rollout, self._resumed_rollout = None, state.get("rollout")
        if self.prompt_statistics is not None and state["prompt_statistics"] is not None:
            self.prompt_statistics.load_state_dict(state["prompt_statistics"])

    def _cited(self) -> tuple[Paper, ...]:
        return *super()._cited(), *self.policy.transition.papers

    def _card_settings(self) -> dict:
        kernel = self.policy.transition.kernel.__name__
        return super()._card_settings() | {"transition": f"{kernel}, noise level {self.policy.noise_level}"}
