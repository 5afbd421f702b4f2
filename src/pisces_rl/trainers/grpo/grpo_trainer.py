"""GRPO for text-to-video policies.

Each video of a group is sampled with noise at the trained denoising steps. The update replays the recorded transitions
with the current adapter and back-propagates each step's clipped loss immediately, so that memory holds the graph of
only one step at a time.

The method is Flow-GRPO's (arXiv 2505.05470) and DanceGRPO's (arXiv 2505.07818); with `transition="ddim"` it is DDPO's
policy gradient (arXiv 2305.13301) with group advantages. The structure and names follow TRL's `GRPOTrainer`.
"""

import os
from collections import defaultdict

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from ...policy import ReplayStep, Rollout
from ...rewards.contract import RewardFuncs
from ...transitions import Paper
from ..auxiliary.auxiliary_loss import AuxiliaryLoss
from ..base.data.seeds import sample_seed
from ..rollouts.losses import (
    STEP_WEIGHTING_PAPERS,
    clip_fractions,
    clipped_policy_loss,
    guarded_log_ratio,
    kl_to_reference,
    prediction_distance,
    step_weight,
)
from ..rollouts.rollout_trainer import WINDOW, Metrics, RolloutTrainer
from ..rollouts.scored import ScoredRollout
from .grpo_config import VideoGRPOConfig


class VideoGRPOTrainer(RolloutTrainer):
    r"""Trains a text-to-video pipeline by group-relative policy optimisation (GRPO).

    For a group of G videos of one prompt with rewards r_i, A_i = (r_i - mean) / (std + 1e-4). For each trained
    denoising step, with rho = p(x' | x) / p_old(x' | x),

        L = mean over samples and steps of  max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL(p || p_ref)

    The reference policy is the model without the adapter, or with the saved one (`continue_reference`).

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

    args: VideoGRPOConfig
    _tag_names = ["trl", "grpo", "text-to-video", "pisces_rl"]
    _name = "Video GRPO"
    papers: tuple[Paper, ...] = (
        Paper("2402.03300", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"),
    )

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs = None,
        args: VideoGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        judge_funcs: RewardFuncs = None,
        peft_config: LoraConfig | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        auxiliary_losses: list[AuxiliaryLoss] | None = None,
    ):
        args = VideoGRPOConfig() if args is None else args
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

    def trained_steps(self, number: int, group: int) -> list[int]:
        """Return the window of trained steps, the same for the whole rollout."""
        return self.policy.draw_window(sample_seed(self.args.seed, number, WINDOW))

    @property
    def shares_noise(self) -> bool:
        return self.args.share_initial_noise

    def backward(self, scored: ScoredRollout, rows: list[int], count: int) -> tuple[Tensor, Metrics]:
        metrics: Metrics = defaultdict(list)
        total, taken = torch.zeros((), device=self.accelerator.device), rows
        # Without a KL penalty, skip samples with advantage 0, which have no gradient, unless ranks share weights and
        # so must make the same calls.
        if not self.args.beta and self.policy.mesh is None:
            taken = [row for row in rows if scored.advantages[row] != 0]
        if not taken:
            steps = len(scored.parts[0][1].steps)
            for name in ("low_mean", "high_mean", "region_mean"):
                metrics[f"clip_ratio/{name}"] += [0.0] * steps
        for samples, places, own in scored.each(taken):
            total += self._update(samples, places, scored, own, count, len(taken) / len(rows), metrics)
        return total, metrics

    def policy_loss(
        self, step: ReplayStep, log_ratio: Tensor, advantage: Tensor, samples: Rollout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy loss of one denoising step of B videos; a subclass may replace it.

        Args:
            step: the replayed step, with the current weights.
            log_ratio: (B,) log p - log p_old, with gradients.
            advantage: (B,) advantages.
            samples: the rollout that `step.rows` belong to; `samples.mean_rows(step.index, step.rows)` is the mean of
                the transition under the policy that sampled it.

        Returns:
            (loss, low, high): loss (B,); low and high are the shares of the B videos whose gradient a clip or mask
            removed and whose advantage is negative (low) or positive (high).
        """
        limits = self.args.epsilon, self.args.upper_epsilon
        return (clipped_policy_loss(log_ratio, advantage, *limits), *clip_fractions(log_ratio, advantage, *limits))

    def _update(
        self,
        samples: Rollout,
        places: list[int],
        scored: ScoredRollout,
        rows: list[int],
        count: int,
        share: float,
        metrics: Metrics,
    ) -> Tensor:
        """Back-propagate the loss of some videos with the same trained steps; return its value.

        Args:
            samples: samples that contain the videos.
            places: rows of the videos in `samples`.
            scored: the rollout.
            rows: rows of the same videos in `scored`.
            count: divisor of the summed losses, as in `backward`.
            share: share of the micro-batch that has a gradient.
            metrics: the values to log are added here.
        """
        args, device = self.args, self.accelerator.device
        before_first_step = self.state.global_step == scored.drawn_at
        total, errors = torch.zeros((), device=device), []
        advantages, old_log_probs = scored.advantages[rows].to(device), samples.log_probs[places]
        orders = {place: order for order, place in enumerate(places)}
        reference = self._reference_steps(samples, places) if args.beta else {}

        def visit(step: ReplayStep) -> None:
            nonlocal total
            k = samples.steps.index(step.index)
            own = slice(orders[step.rows[0]], orders[step.rows[-1]] + 1)  # the rows of a visit are consecutive
            log_ratio, advantage = step.log_prob - old_log_probs[own, k], advantages[own]
            if before_first_step:
                errors.append((step.index, log_ratio.detach().abs().max()))
            weight = step_weight(args.step_weighting, step.std, step.gain, step.step_size)
            if args.step_weighting == "guard":
                old_mean = samples.mean_rows(step.index, step.rows)
                log_ratio = guarded_log_ratio(log_ratio, step.mean, old_mean, step.std, samples.rows_per_video)
            loss, low, high = self.policy_loss(step, log_ratio, advantage, samples)
            loss = weight * loss
            if args.beta:
                expected = reference[step.index, step.rows[0]]
                if args.kl_space == "x":
                    kl = kl_to_reference(step.mean, expected.mean, step.std, samples.rows_per_video)
                else:
                    kl = prediction_distance(step.prediction, expected.prediction, samples.rows_per_video)
                loss = loss + args.beta * kl
                metrics["kl"].append(kl.detach().mean())
            loss = loss.sum() / (count * len(samples.steps))
            with self.logged_gradient(step.index):
                self.backward_loss(loss)
            total = total + loss.detach()
            metrics["clip_ratio/low_mean"].append(low * share)
            metrics["clip_ratio/high_mean"].append(high * share)
            metrics["clip_ratio/region_mean"].append((low + high) * share)
            metrics["ratio/mean"].append(log_ratio.detach().exp().mean())
            metrics["ratio/max_deviation"].append((log_ratio.detach().exp() - 1).abs().max())

        self.policy.replay(samples, places, visit, wait=False)
        self._check_replay(errors, metrics)
        return total

    def _reference_steps(self, samples: Rollout, places: list[int]) -> dict[tuple[int, int], ReplayStep]:
        """Replay the trained steps with the reference policy, without gradients: {(index, first row): step}."""
        steps: list[ReplayStep] = []
        with self.initial.reference():
            self.policy.replay(samples, places, steps.append, grad=False, wait=False)
        return {(step.index, step.rows[0]): step for step in steps}

    def _check_replay(self, errors: list[tuple[int, Tensor]], metrics: Metrics) -> None:
        """Raise a RuntimeError unless the ratio is 1 before the first optimizer step on a rollout.

        Args:
            errors: pairs of a denoising step and its largest |log p - log p_old|.
            metrics: the errors are logged here.
        """
        for index, largest in errors:
            error = largest.item()
            metrics["replay/max_log_prob_error"].append(error)
            if not error <= self.args.replay_tolerance:
                raise RuntimeError(
                    f"denoising step {index}: log p differs by {error:.3g} between sampling and update, before any "
                    f"optimizer step (replay_tolerance {self.args.replay_tolerance:g}). The update would follow "
                    "numerical noise. Use the same attention kernel, compilation and precision (fp32 or bf16) in "
                    "both, and no feature cache; or raise replay_tolerance if the error is small next to the clip "
                    "range."
                )

    def _cited(self) -> tuple[Paper, ...]:
        return *super()._cited(), *self.policy.transition.papers, *STEP_WEIGHTING_PAPERS[self.args.step_weighting]

    def _card_settings(self) -> dict:
        kernel = self.policy.transition.kernel.__name__
        return super()._card_settings() | {"transition": f"{kernel}, noise level {self.policy.noise_level}"}
