"""Reward backpropagation: follow the gradient of differentiable rewards through VAE decoder and denoiser."""

import itertools
import os
import time
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ...policy import DecodedPart
from ...rewards import RewardTable
from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..auxiliary.auxiliary_loss import AuxiliaryLoss
from ..base._trl import EpochRepeatSampler
from ..base.data.images import images_of
from ..base.data.seeds import sample_seed
from ..base.data.video_data import undecoded
from ..base.policy_trainer import VideoPolicyTrainer
from ..base.setup.checks import check_dataset
from ..base.watch.training_metrics import add_recorded
from ..rollouts.advantages import aggregate_rewards, nanstd
from .backprop_config import RewardBackpropConfig

NOISE, STEPS, PART, RENOISE = range(10, 14)  # purposes of seeds


class RewardBackpropTrainer(VideoPolicyTrainer):
    r"""Trains a text-to-video pipeline by following the gradient of its rewards.

        L = - mean over samples of  sum_i w_i r_i( decode( x0 ) ),

    with x0 a deterministic sample whose last steps carry gradients, or a one-step prediction; see
    `RewardBackpropConfig.backprop_through`. It needs no groups and no exploration noise. But every reward must be
    differentiable with respect to the pixels, and the policy can exploit a reward by changes that no viewer would call
    better: watch the judges.

    Rewards are optional with an auxiliary loss: with `ConsistencyDistillation` alone, the trainer distils.

    Methods: ReFL (arXiv 2304.05977), DRaFT and DRaFT-LV (arXiv 2309.17400), AlignProp (arXiv 2310.03739), VADER (arXiv
    2407.08737).

    Example:

    ```python
    from datasets import Dataset
    from pisces_rl import RewardBackpropConfig, RewardBackpropTrainer
    from pisces_rl.rewards import load_reward

    trainer = RewardBackpropTrainer(
        model="tiny-wan",
        reward_funcs=[load_reward("ot_quality"), load_reward("ot_semantic")],
        args=RewardBackpropConfig(output_dir="follow", max_steps=10, height=64, width=64, num_frames=17),
        train_dataset=Dataset.from_dict({"prompt": ["a red circle", "two blue squares"]}),
    )
    trainer.train()
    ```

    Arguments are those of `VideoPolicyTrainer`; `args` is a `RewardBackpropConfig`.

    Raises:
        ValueError: a reward lacks the attribute `differentiable = True`.
    """

    args: RewardBackpropConfig
    _tag_names = ["trl", "reward-backpropagation", "text-to-video", "pisces_rl"]
    _name = "Reward Backpropagation"
    papers = (
        Paper("2304.05977", "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation"),
        Paper("2309.17400", "Directly Fine-Tuning Diffusion Models on Differentiable Rewards"),
        Paper("2310.03739", "Aligning Text-to-Image Diffusion Models with Reward Backpropagation"),
        Paper("2407.08737", "Video Diffusion Alignment via Reward Gradients"),
    )
    _position_settings = ("per_device_train_batch_size", "gradient_accumulation_steps")

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: RewardBackpropConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        judge_funcs: RewardFuncs = None,
        peft_config: LoraConfig | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        auxiliary_losses: list[AuxiliaryLoss] | None = None,
    ):
        args = RewardBackpropConfig() if args is None else args
        self._rewards_optional = bool(auxiliary_losses)
        check_dataset("train_dataset", train_dataset)
        train_dataset = undecoded(train_dataset)
        needed = args.per_device_train_batch_size * args.data_parts * args.gradient_accumulation_steps
        if len(train_dataset) < needed:
            raise ValueError(
                f"an optimizer step needs {needed} different prompts (per_device_train_batch_size "
                f"{args.per_device_train_batch_size} * {args.data_parts} processes * gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps}), but train_dataset has only {len(train_dataset)}; add prompts, "
                "or lower the batch size."
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
        self.rewards.check_differentiable()
        self.reward_std = torch.full((len(self.rewards),), torch.nan)  # running average; NaN before the first step
        self._seen: list[Tensor] = []  # reward values of this optimizer step's micro-batches

    # --- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            self.train_dataset,
            "Training",
            self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        args = self.args
        sampler = EpochRepeatSampler(
            self.train_dataset if dataset is None else dataset,  # type: ignore[arg-type]
            mini_repeat_count=1,
            shuffle=args.shuffle_dataset,
            batch_size=self._train_batch_size * args.data_parts * args.gradient_accumulation_steps,
            seed=args.seed,
        )
        sampler.current_epoch = lambda: int(self.state.epoch or 0)  # type: ignore[method-assign]
        return sampler

    # --- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        start = time.perf_counter()
        prompts = [row["prompt"] for row in inputs]
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
        loss = self.backward_auxiliary_losses()
        if len(self.rewards):
            loss += self._follow(prompts, columns)
        if self.accelerator.sync_gradients:
            self.all_reduce_gradients()
            if len(self.rewards):
                self._measure_spread()
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - start)
        return loss

    def _follow(self, prompts: list[str], columns: dict) -> Tensor:
        """Back-propagate the loss of one micro-batch; return its value."""
        args, device = self.args, self.accelerator.device
        batch = self._step * args.data_parts + self.data_part
        rows = range(batch * len(prompts), (batch + 1) * len(prompts))  # rows of the run, for any split into batches
        noise_seeds = [sample_seed(args.seed, NOISE, row) for row in rows]
        images = images_of(columns | {"prompt": prompts}, self.image_columns)
        total, copies = torch.zeros((), device=device), self._copies(prompts, rows, noise_seeds, images)
        weights = self.reward_weights / self._scale()
        for how in copies:
            with self.stage("sampling"):
                videos = self.policy.sample_with_gradients(
                    prompts,
                    noise_seeds=noise_seeds,
                    conditions=images,
                    checkpoint_decoder=args.checkpoint_decoder,
                    **how,
                )
            with self.stage("rewards"):
                table, gradients = self.rewards.with_gradients(prompts, videos, columns, self.state)
            with self.stage("update"):
                share = len(prompts) * len(copies) * self.current_gradient_accumulation_steps
                videos.backward(-sum(w * g for w, g in zip(weights.tolist(), gradients)) / share)
            total -= aggregate_rewards(table.values, weights).sum().to(device) / share
            self._seen.append(table.values)
            self._log_rewards(table, gradients)
        return total

    def _copies(self, prompts: list[str], rows: range, noise_seeds: list[int], images: dict[str, list]) -> list[dict]:
        """Return the arguments of `sample_with_gradients` for each way to draw the samples: one or several."""
        args, steps = self.args, self.args.num_inference_steps
        part = {}
        if args.decode_frames is not None:
            part["part"] = DecodedPart(args.decode_frames, sample_seed(args.seed, PART, self._step))
        drawn = torch.Generator().manual_seed(sample_seed(args.seed, STEPS, self._step))  # equal on all processes
        if args.backprop_through == "one_step":
            low, high = args.one_step_range or (0, steps)
            return [part | {"jump_at": int(torch.randint(low, high, (1,), generator=drawn))}]
        if args.backprop_through == "random_steps":
            return [part | {"last_steps": int(torch.randint(1, steps + 1, (1,), generator=drawn))}]
        if args.backprop_through == "last_steps":
            return [part | {"last_steps": args.backprop_steps}]
        with self.stage("sampling"):
            final = self.policy.final_latents(prompts, noise_seeds=noise_seeds, conditions=images)
        seeds = [[sample_seed(args.seed, RENOISE, k, row) for row in rows] for k in range(args.low_variance_samples)]
        return [part | {"renoise": (final, own)} for own in seeds]

    def _scale(self) -> Tensor:
        """Return the divisor of each reward."""
        if self.args.scale_rewards == "none":
            return torch.ones_like(self.reward_std)
        return torch.where(self.reward_std.isfinite(), self.reward_std, 1.0).clamp_min(1e-4)

    def _measure_spread(self) -> None:
        """Update and log the standard deviation of each reward over an optimizer step's samples on all processes."""
        values = torch.cat(gather_object([torch.cat(self._seen)])[:: self.args.context_parallel])
        self._seen = []
        if len(values) < 2:
            return
        present, decay = nanstd(values, 0), self.args.reward_std_decay
        average = decay * self.reward_std + (1 - decay) * present
        average = torch.where(self.reward_std.isnan(), present, average)
        self.reward_std = torch.where(
            present > 0, average, self.reward_std
        )  # equal values say nothing about the scale
        if self.is_world_process_zero():
            for name, std in zip(self.rewards.names, present.tolist()):
                self._metrics["train"][f"rewards/{name}/std"].append(std)
            self._metrics["train"]["reward_std"].append(nanstd(aggregate_rewards(values, self.reward_weights)).item())

    def _log_rewards(self, table: RewardTable, gradients: list[Tensor]) -> None:
        metrics, values = self._metrics["train"], table.values
        for i, name in enumerate(self.rewards.names):
            metrics[f"rewards/{name}/mean"].append(values[:, i].mean().item())
            metrics[f"rewards/{name}/grad_norm"].append(gradients[i].flatten(1).norm(dim=1).mean().item())
            metrics[f"seconds/rewards/{name}"].append(table.seconds[name])
        metrics["reward"].append(aggregate_rewards(values, self.reward_weights).mean().item())
        for i, j in itertools.combinations(range(len(gradients)), 2):
            cosine = torch.cosine_similarity(gradients[i].flatten(1), gradients[j].flatten(1)).mean().item()
            metrics[f"grad_cosine/{self.rewards.names[i]}/{self.rewards.names[j]}"].append(cosine)
        add_recorded(metrics, table)

    # --- resume, card ------------------------------------------------------------------------------------------------

    def _extra_state(self) -> dict:
        return super()._extra_state() | {"reward_stds": dict(zip(self.rewards.names, self.reward_std.tolist()))}

    def _load_extra_state(self, state: dict) -> None:
        super()._load_extra_state(state)
        known = state.get("reward_stds", {})  # a reward that was added on resume starts without an average
        self.reward_std = torch.tensor([known.get(name, torch.nan) for name in self.rewards.names])

    def _cited(self) -> tuple[Paper, ...]:
        return super()._cited() if len(self.rewards) else ()  # without rewards, only the auxiliary losses train

    def _card_settings(self) -> dict:
        through = {
            "last_steps": f"the last {self.args.backprop_steps}",
            "random_steps": "a random number of last",
            "low_variance": "the last, low variance,",
            "one_step": "one-step predictions of random",
        }
        return super()._card_settings() | {
            "gradient": f"through {through[self.args.backprop_through]} of {self.args.num_inference_steps} steps"
        }
