"""What every trainer of video policies shares: loading, evaluation, what a run leaves, save and resume."""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from .. import assets, hub, media
from ..policy import (
    VideoPolicy,
    adapters_off,
    add_lora,
    check_saved_lora,
    check_saved_weights,
    default_lora_config,
    has_guider,
    load_lora_state,
    lora_parameters,
    save_lora,
)
from ..rewards import RewardPanel, RewardTable
from ._trl import _BaseTrainer, identity
from .callbacks import AdapterEMA, StageProgress
from .checkpoint import load_tree, random_state, restore_random_state, save_tree
from .consistency import ConsistencyDistillation
from .images import check_images, image_columns, images_of
from .launch import requested_sharding, shard_policy, share_tokens_of_policy
from .ranks import Ranks
from .report import compare, markdown_comparison, print_comparison, read_evaluation
from .seeds import sample_seed
from .timeline import Timeline, TimelineSteps, timeline_table
from .video_data import check_videos, undecoded
from .zero import PartitionedOptimizer, requested_zero, use_zero


def load_pipeline(model: str | DiffusionPipeline, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A pipeline by name: an embedded model ("tiny-wan"), a folder, or a Hub id. A pipeline passes through.

    Args:
        dtype: dtype of the weights; modules that a model keeps in fp32 stay so. None leaves it to diffusers.
    """
    if isinstance(model, DiffusionPipeline):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"model={model!r} must be a diffusers pipeline, a Hub id, a folder or one of {assets.available()}."
        )
    path = assets.asset_path(model) if model in assets.available() else model
    try:
        return DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"model={str(model)!r} is neither a folder with a diffusers pipeline, nor a Hub id that could be read, "
            f"nor one of the embedded models {assets.available()}: {error}"
        ) from error


def check_dataset(name: str, dataset, several: bool = False) -> None:
    """A data set of prompts (where `several` may be: or a dict of them), or a ValueError that says what is missing."""
    if several and isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part)
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name} is a {type(dataset).__name__}; pass a datasets.Dataset with a `prompt` column.")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} has columns {dataset.column_names} but none named `prompt`; rename the text column.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; it needs at least one prompt.")
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"{name} row {row}: prompt is {prompt!r}; every prompt must be a string.")


class VideoPolicyTrainer(_BaseTrainer):
    """A TRL trainer whose model is a `VideoPolicy` with a LoRA adapter.

    Args:
        model: a text-to-video pipeline of diffusers, a Hub id, a folder, or an embedded model's name.
        reward_funcs: reward callables to train on, see `pisces_rl.rewards.contract`.
        args: a config.
        train_dataset: prompts in a column `prompt`; every other column reaches the rewards (one of `datasets.Video` as
            its file, {"path", "bytes"}), and those of args.image_columns the pipeline.
        eval_dataset: prompts for evaluation, or {name: data set}; their noise is fixed.
        judge_funcs: reward callables that are only measured, on the evaluation set.
        peft_config: a `peft.LoraConfig`; None is rank 16 on attention and feed-forward projections.
        callbacks: further callbacks.
        video_dataset: captioned videos for the consistency term: rows with `prompt`, the image columns, and `video`: a
            path, the bytes of a file, a `datasets.Video`, or a tensor (F, 3, H, W) in [0, 1] or uint8. Needed where
            args.consistency_weight is not 0.
    """

    loss_is_scaled_for_ga = True
    _may_lack_rewards = False  # where there is a consistency term
    _position_settings: tuple[str, ...] = ()  # settings by which the position in the data is counted

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, judge_funcs=None,
                 peft_config: LoraConfig | None = None, callbacks: list | None = None, video_dataset=None):
        args = copy.copy(args)  # the caller's serves another trainer
        sharding, zero_stage = requested_sharding(args), requested_zero(args)
        check_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            check_dataset("eval_dataset", eval_dataset, several=True)
        train_dataset, eval_dataset = undecoded(train_dataset), undecoded(eval_dataset)
        self.rewards, self.judges = (
            RewardPanel(funcs, args.reward_timeout) for funcs in (reward_funcs, judge_funcs))
        if bool(args.consistency_weight) != (video_dataset is not None):
            raise ValueError(
                f"consistency_weight={args.consistency_weight}, and video_dataset is a "
                f"{type(video_dataset).__name__}: the consistency term needs both, or leave both out."
            )
        if video_dataset is not None:
            check_videos(video_dataset)
        if not len(self.rewards) and not (self._may_lack_rewards and args.consistency_weight):
            raise ValueError("reward_funcs is empty; pass at least one callable f(prompts, videos, **columns).")
        weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.rewards)} rewards; give one each."
            )
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        if eval_dataset is None:
            args.eval_on_start = False
            if args.eval_strategy != "no":
                raise ValueError(f"eval_strategy={str(args.eval_strategy.value)!r} needs an eval_dataset.")
        if args.load_best_model_at_end and args.metric_for_best_model == "loss":
            args.metric_for_best_model, args.greater_is_better = "reward", True
        if args.load_best_model_at_end and args.metric_for_best_model == "reward" and not len(self.rewards):
            raise ValueError(
                "load_best_model_at_end=True, but without rewards nothing says which model is best: set "
                "metric_for_best_model to a judge, for instance 'judges/NAME/mean' (with several evaluation sets "
                "'SET_judges/NAME/mean')."
            )
        self._checked_checkpoint(args, args.resume_from_checkpoint)

        set_seed(args.seed)  # the same LoRA initialisation on every process
        self.model_name = str(model) if isinstance(model, (str, os.PathLike)) else (
            getattr(model, "name_or_path", "") or type(model).__name__)
        self.pipeline = load_pipeline(model, torch.bfloat16 if args.bf16 else torch.float32)
        self.image_columns = image_columns(self.pipeline, args.image_columns)
        check_images("train_dataset", train_dataset, self.image_columns)
        if eval_dataset is not None:
            check_images("eval_dataset", eval_dataset, self.image_columns)
        self._freeze(args.device)
        self.policy = VideoPolicy(self.pipeline, **args.policy_settings())
        self.adapted_modules = add_lora(dict(self.policy.denoiser.items()), peft_config or default_lora_config(),
                                        args.lora_denoisers)
        self.adapter = lora_parameters(dict(self.policy.denoiser.items()))
        self._weights = {name: _weights_digest(module) for name, module in self.policy.denoiser.items()}
        if args.torch_compile:
            self.policy.compile_blocks(args.recompute if args.gradient_checkpointing else "nothing",
                                       args.torch_compile_backend or "inductor", args.torch_compile_mode)
        args._n_gpu = min(args.n_gpu, 1)  # many GPUs are many processes, never DataParallel

        self.progress = StageProgress()
        self.timeline = Timeline(args.device, args.process_index, args.trace_steps)
        self.policy.record_with(self.timeline.span)
        self.rewards.record = self.judges.record = self.timeline.span
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step = 0  # micro-batches so far
        self._idle_experts: set[str] = set()  # of which was said that they had no gradient
        self._evaluated_at: int | None = None
        self._best_step: int | None = None  # set when the best checkpoint replaces the last
        self.first_evaluation: dict | None = None
        self.last_evaluation: dict | None = None
        own = [TimelineSteps(self.timeline), self.progress]
        super().__init__(model=self.policy, args=args, data_collator=identity, train_dataset=train_dataset,
                         eval_dataset=eval_dataset, callbacks=[*own, *(callbacks or [])])
        for bar in (ProgressCallback, PrinterCallback):
            self.remove_callback(bar)
        self.ranks = Ranks(self.accelerator, args.ddp_timeout)
        if args.context_parallel > 1:
            share_tokens_of_policy(self.policy, self.accelerator, args.context_parallel)
        if sharding is not None:
            shard_policy(self.policy, self.accelerator, sharding)
            self.is_fsdp_enabled = False  # for Trainer, which would have accelerate wrap the policy
        if zero_stage is not None:
            use_zero(zero_stage, self.policy, self.accelerator, args.max_grad_norm)
            self.is_deepspeed_enabled = False  # likewise
        members = args.offload or []
        self.policy.place(self.accelerator.device, [kind for kind in members if kind != "rewards"])
        for panel in (self.rewards, self.judges) if "rewards" in members else ():
            panel.offload(self.accelerator.device)
        # The adapter's gradients are all-reduced here, once per optimizer step: no DDP wrapper, so that the pipeline
        # may call its denoisers as it likes.
        prepare_model = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **kwargs: prepare_model(
            model, **kwargs | {"evaluation_mode": True, "device_placement": False})
        self.ema = AdapterEMA(self.adapter, args.ema_decay) if args.ema_decay else None
        if self.ema is not None:
            self.add_callback(self.ema)
        self.consistency = None
        if args.consistency_weight:
            self.consistency = ConsistencyDistillation(
                self.policy, self.adapter, video_dataset, steps=args.consistency_steps,
                guidance=args.consistency_guidance, decay=args.consistency_decay, seed=args.seed,
                image_columns=self.image_columns,
            )
            self.add_callback(self.consistency.average)
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=120)
        if self.is_world_process_zero():
            total = sum(p.numel() for p in self.adapter.values())
            self.console.print(f"LoRA on {self.adapted_modules} modules, {total / 1e6:.2f} M trainable parameters")
            for leftover in Path(args.output_dir).glob(".incomplete-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._earlier_run = [*Path(args.output_dir).glob("checkpoint-*"),
                                 *Path(args.output_dir).glob("evaluations")]  # fmt: skip

    def _freeze(self, device: torch.device) -> None:
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        for parameter in self.pipeline.vae.parameters() if hasattr(self.pipeline, "vae") else ():
            if parameter.ndim == 5 and device.type == "cpu":  # the same numbers, decoded twice as fast
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)

    def _send_telemetry(self) -> None:
        """TRL's reads a language model's config; a diffusion policy has none."""

    def _wrap_model(self, model, training=True, dataloader=None):
        return model

    def _move_model_to_device(self, model, device) -> None:
        """`VideoPolicy.place` moves what is to be there."""

    @contextlib.contextmanager
    def stage(self, name: str):
        """Names what is being done on the progress bar and the time line, which logs its seconds."""
        self.progress.stage(name)
        with self.timeline.span(name, whole=name in ("consistency", "saving")):
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(key.startswith("eval") for key in logs):
            own = {name: _as_floats(values) for name, values in self._metrics["train"].items()}
            own |= {"loss": [logs["loss"]]} if "loss" in logs else {}
            own |= {f"seconds/{part}": [seconds] for part, seconds in self.timeline.read().items()}
            merged = defaultdict(list)  # over all processes
            for metrics in gather_object([own]):
                for name, values in metrics.items():
                    merged[name] += values
            processes = self.accelerator.num_processes
            for name, values in merged.items():
                if values and name.rsplit("/", 1)[-1].startswith("max_"):
                    logs[name] = max(values)
                elif values:  # seconds are a process's total since the last log, everything else is a mean
                    logs[name] = sum(values) / (processes if name.startswith("seconds/") else len(values))
            self._metrics["train"].clear()
        super().log(logs, start_time)

    def _distil(self) -> Tensor:
        """Back-propagate the consistency term of one micro-batch, if there is one; returns its weighted value."""
        if self.consistency is None:
            return torch.zeros((), device=self.accelerator.device)
        with self.stage("consistency"):
            count = self.args.consistency_batch_size or self.args.per_device_train_batch_size
            part = self.data_part, self.args.data_parts
            loss = self.consistency.loss(self._step, count, part).mean()
            self._metrics["train"]["consistency_loss"].append(loss.item())
            loss = self.args.consistency_weight * loss / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
        return loss.detach()

    def _log_recorded(self, table: RewardTable) -> None:
        """What rewards recorded: metrics, and means of per-sample values."""
        metrics = self._metrics["train"]
        for name, recorded in table.metrics.items():
            metrics[name] += recorded
        for name, recorded in table.extras.items():
            known = [float(v) for v in recorded if isinstance(v, (bool, int, float))]
            if known:
                metrics[f"{name}/mean"].append(sum(known) / len(known))

    # --- many processes ----------------------------------------------------------------------------------------------

    @property
    def data_part(self) -> int:
        """Which part of the videos this process works on, of `args.data_parts`."""
        return self.accelerator.process_index // self.args.context_parallel

    @property
    def _calls_together(self) -> bool:
        """Whether the policy runs only where several processes call it at the same time."""
        return self.policy.mesh is not None or self.policy.shares_tokens

    def all_reduce_gradients(self) -> None:
        """Average the adapter's gradients over processes, in one message.

        Where every sample had advantage 0 there is none, and it becomes 0: the optimizer then takes the same step
        (of its momentum) on one process as on several.
        """
        step = self.state.global_step
        if step % self.args.equal_weights_steps == 0:
            self.check_equal_weights()
        self.ranks.meet(f"to average gradients at optimizer step {step + 1}")
        for parameter in self.adapter.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if isinstance(self.optimizer, PartitionedOptimizer):
            torch._foreach_mul_([p.grad for p in self.adapter.values()], self.args.context_parallel)
            self.optimizer.reduce()
        elif self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in self.adapter.values()])
            # the mean over videos, of the sum over the ranks that share a video's tokens
            flat = self.accelerator.reduce(flat, reduction="mean") * self.args.context_parallel
            offset = 0
            for parameter in self.adapter.values():
                parameter.grad.copy_(flat[offset:offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
        if len(self.adapted_modules) > 1:
            self._log_gradient_of_experts()

    def _log_gradient_of_experts(self) -> None:
        """Logs each denoiser's gradient norm; says once where one had none, since no trained step called it."""
        parts = {name: [p for key, p in self.adapter.items() if key.startswith(f"{name}.")]
                 for name in self.adapted_modules}  # fmt: skip
        if isinstance(self.optimizer, PartitionedOptimizer):
            norms = self.optimizer.norms(parts)
        else:
            norms = {name: torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in own]))).item()
                     for name, own in parts.items()}  # fmt: skip
        for name, norm in norms.items():
            self._metrics["train"][f"grad_norm/{name}"].append(norm)
        idle = [name for name, norm in norms.items() if norm == 0 and name not in self._idle_experts]
        if idle and any(norms.values()):
            self._idle_experts.update(idle)
            warnings.warn(
                f"no trained denoising step called {idle[0]} at optimizer step {self.state.global_step + 1}, so its "
                "adapter got no gradient. Where that is always so, let the trained steps reach its part of the "
                "schedule (sde_window_range, last_steps), or leave it out of lora_denoisers.", stacklevel=2,
            )

    def check_equal_weights(self) -> None:
        """All processes must hold the same adapter; a RankError names the ranks that do not."""
        self.ranks.meet(f"to compare weights after optimizer step {self.state.global_step}")
        self.ranks.check_equal(self.adapter.values())

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Deterministic samples of every evaluation prompt from fixed noise, scored by rewards and judges.

        Returns:
            Means: `eval_reward`, `eval_rewards/{name}/mean`, `eval_judges/{name}/mean`, `eval_{extra}/mean` for
            per-sample values that rewards recorded and `eval_{metric}` for their scalars (over calls, weighted by
            their videos); with several data sets, `eval_{set}_...`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_dataset("eval_dataset", dataset, several=True)
        sets = dataset if isinstance(dataset, dict) else {"eval": dataset}
        metrics, evaluation = {}, {}
        with self.ema or contextlib.nullcontext():
            for name, part in sets.items():
                with self.timeline.span("evaluation", whole=True):
                    prompts, scores, recorded = self._evaluate_set(name, part)
                evaluation[name] = {"prompts": prompts, "scores": scores}
                prefix = f"{metric_key_prefix}_{name}" if isinstance(dataset, dict) else metric_key_prefix
                metrics |= {f"{prefix}_{key}": value for key, value in recorded.items()}
                for score, values in scores.items():
                    known = [v for v in values if v is not None]
                    if known:
                        suffix = "" if score == "reward" else "/mean"
                        metrics[f"{prefix}_{score}{suffix}"] = float(np.mean(known))
        if isinstance(dataset, dict):
            keys = [f"{metric_key_prefix}_{name}_reward" for name in sets]
            rewards = [metrics[key] for key in keys if key in metrics]  # a reward may apply to no prompt of a set
            if rewards:
                metrics[f"{metric_key_prefix}_reward"] = float(np.mean(rewards))
        if eval_dataset is None:
            self._evaluated_at = self.state.global_step
            self.last_evaluation = evaluation
            self.first_evaluation = self.first_evaluation or evaluation
            self._write_json(f"evaluations/step_{self.state.global_step:06d}.json",
                             {"step": self.state.global_step, "sets": evaluation})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_set(self, name: str, dataset: Dataset) -> tuple[list[str], dict[str, list], dict[str, float]]:
        """Prompts and scores of one data set, in its order, and metrics; every process takes a consecutive share."""
        ranks, rank = self.args.data_parts, self.data_part
        share = -(-len(dataset) // ranks)
        own = list(range(min(rank * share, len(dataset)), min((rank + 1) * share, len(dataset))))
        count = len(own)
        if self.policy.mesh is not None:  # all ranks sample as many: the last rank samples some that it does not score
            own += [len(dataset) - 1] * (share - count)
        batch = self.args.per_device_eval_batch_size
        rows, kept, recorded = [], [], []
        for start in range(0, len(own), batch):
            self.progress.stage(f"evaluation {name} {100 * start // max(len(own), 1)}%")
            indices = own[start:start + batch]
            part = dataset[indices]
            images = images_of(part, self.image_columns)
            prompts = part.pop("prompt")
            noise = [self._eval_noise(i) for i in indices]
            rollout = self.policy.sample(prompts, noise_seeds=noise, conditions=images)
            indices = indices[:max(0, count - start)]
            if not indices:
                continue
            prompts, rollout.videos = prompts[:len(indices)], rollout.videos[:len(indices)]
            part = {key: values[:len(indices)] for key, values in part.items()}
            scores, metrics = self._score_evaluation(prompts, rollout.videos, part)
            if self.accelerator.process_index % self.args.context_parallel:  # another one has these
                continue
            recorded += [(key, value, len(indices)) for key, values in metrics.items() for value in values]
            rows += [{"row": i} | {k: v[j] for k, v in scores.items()} for j, i in enumerate(indices)]
            if rank == 0 and len(kept) < self.args.num_sample_videos:
                kept += list(rollout.videos.cpu()[:self.args.num_sample_videos - len(kept)])
        self.ranks.meet(f"in the evaluation of {name!r}")
        rows = sorted(gather_object(rows), key=lambda r: r["row"])
        names = list(dict.fromkeys(key for row in rows for key in row if key != "row"))
        scores = {key: [row.get(key) for row in rows] for key in names}
        if self.is_world_process_zero() and kept:
            prompts = dataset["prompt"][:len(kept)]
            self._write_samples(f"samples/step_{self.state.global_step:06d}/{name}", torch.stack(kept), list(prompts),
                                {k: v[:len(kept)] for k, v in scores.items()}, tag=f"eval/{name}")
        totals: dict[str, list[float]] = {}
        for key, value, count in gather_object(recorded):
            total = totals.setdefault(key, [0.0, 0.0])
            total[0] += value * count
            total[1] += count
        return list(dataset["prompt"]), scores, {key: total / count for key, (total, count) in totals.items()}

    def _eval_noise(self, row: int) -> int:
        return sample_seed(self.args.eval_seed, row)

    def _score_evaluation(self, prompts: list[str], videos: Tensor, columns: dict) -> tuple[dict, dict]:
        """Per-sample scores: weighted reward, each reward, each judge, and what they recorded; and their metrics."""
        table = self.rewards(prompts, videos, columns, self.state)
        total = (table.values * self.reward_weights).nansum(1).masked_fill(table.values.isnan().all(1), torch.nan)
        scores = {"reward": _with_none(total)}
        scores |= {f"rewards/{n}": _with_none(table.values[:, i]) for i, n in enumerate(self.rewards.names)}
        extras, metrics = dict(table.extras), dict(table.metrics)
        if len(self.judges):
            judged = self.judges(prompts, videos, columns, self.state)
            scores |= {f"judges/{n}": _with_none(judged.values[:, i]) for i, n in enumerate(self.judges.names)}
            extras |= judged.extras
            metrics |= judged.metrics
        for key, values in extras.items():
            if all(v is None or isinstance(v, (bool, int, float)) for v in values):
                scores[key] = [None if v is None else float(v) for v in values]
        return scores, metrics

    # --- what a run leaves -------------------------------------------------------------------------------------------

    def _write_json(self, name: str, content) -> None:
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content))
            os.replace(temporary, path)

    def _write_samples(self, name: str, videos: Tensor, prompts: list[str], scores: dict[str, list], tag: str) -> None:
        """mp4 files, a contact sheet, the scores, and videos for TensorBoard."""
        folder = Path(self.args.output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for row, video in enumerate(videos):
            media.save_video(video, folder / f"{row:03d}.mp4", fps=self.args.fps)
        media.contact_sheet(videos, prompts, folder / "sheet.png", scores=next(iter(scores.values())))
        self._write_json(f"{name}/rewards.json", {"prompts": prompts, "scores": scores})
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                media.add_gif(callback.tb_writer, tag, videos, self.state.global_step, fps=self.args.fps)

    def _finish(self) -> None:
        """The last evaluation, and before against after."""
        if self._evaluated_at != self.state.global_step:
            self.evaluate()
        before, same = {}, {}
        if self.is_world_process_zero():
            first = sorted((Path(self.args.output_dir) / "evaluations").glob("step_*.json"))[0]
            before = json.loads(first.read_text())
            if before["step"] < self._weights_step:
                same = {name: part for name, part in before["sets"].items()  # an earlier run here may have had others
                        if name in self.last_evaluation and part["prompts"] == self.last_evaluation[name]["prompts"]}
        names = broadcast_object_list([list(same)])[0]
        samples_here = self.is_world_process_zero() or self._calls_together
        videos = {name: self._before_and_after(name) for name in names} if samples_here else {}
        if same:
            comparison = compare(same, self.last_evaluation)
            self._write_json("report.json", {"from_step": before["step"], "to_step": self._weights_step,
                                             "comparison": comparison})
            (Path(self.args.output_dir) / "report.md").write_text(markdown_comparison(comparison))
            self._before_after_sheets(same, videos)
            print_comparison(comparison, f"step {before['step']} -> {self._weights_step}", self.console)
        self._wait()

    @property
    def _weights_step(self) -> int:
        """The optimizer step whose weights the adapter holds."""
        return self.state.global_step if self._best_step is None else self._best_step

    def _before_and_after(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Videos of the base model and of the trained one for the first prompts of a set, of the same noise."""
        if not self.args.num_sample_videos:
            return None
        dataset = self.eval_dataset[name] if isinstance(self.eval_dataset, dict) else self.eval_dataset
        part = dataset[:self.args.num_sample_videos]
        prompts = list(part["prompt"])
        own = {"noise_seeds": [self._eval_noise(i) for i in range(len(prompts))],
               "conditions": images_of(part, self.image_columns)}
        with adapters_off(self.policy):
            base = self.policy.sample(prompts, **own).videos.cpu()
        with self.ema or contextlib.nullcontext():
            return base, self.policy.sample(prompts, **own).videos.cpu()

    def _before_after_sheets(self, before: dict, videos: dict[str, tuple[Tensor, Tensor] | None]) -> None:
        """The base model and the trained one on the same prompts and noise, side by side."""
        for name in before if self.args.num_sample_videos else ():
            base, trained = videos[name]
            prompts, count = before[name]["prompts"][:len(base)], len(base)
            path = Path(self.args.output_dir) / "samples" / f"before_after_{name}.png"
            media.before_after_sheet(
                base, trained, prompts, path,
                before_scores=before[name]["scores"]["reward"][:count],
                after_scores=self.last_evaluation[name]["scores"]["reward"][:count],
            )

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()

    # --- train, save, resume -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; `resume_from_checkpoint` is a checkpoint folder, or True for the last one in output_dir."""
        self._best_step = None
        checkpoint = self._checked_checkpoint(self.args, resume_from_checkpoint or self.args.resume_from_checkpoint)
        if checkpoint is not None:
            self._check_same_model(checkpoint)
            self.args.eval_on_start = False
        elif self.is_world_process_zero():
            self._set_aside_earlier_run()
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except KeyboardInterrupt:
            last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
            advice = f"Resume with resume_from_checkpoint={last}" if last else "No checkpoint was written yet"
            if self.is_world_process_zero():
                self.console.print(f"\nInterrupted at step {self.state.global_step}. {advice}.", style="yellow")
            raise
        except RuntimeError as error:
            self.ranks.explain(error, f"after optimizer step {self.state.global_step}")
            raise
        finally:
            self._write_trace()
        if self.eval_dataset is not None:
            with self.timeline.span("evaluation", whole=True):
                self._finish()
        self._print_timeline()
        return output

    def _write_trace(self) -> None:
        """Of this process, also where the run broke off; a run does not end for want of it."""
        path = Path(self.args.output_dir) / f"trace_rank{self.args.process_index}.json"
        try:
            if self.args.trace_steps:
                self.timeline.write_trace(path)
        except OSError as error:
            warnings.warn(f"{path} could not be written: {error}.", stacklevel=2)

    def _print_timeline(self) -> None:
        """Where the seconds of this training went, a mean over processes."""
        self.timeline.stop()
        processes = gather_object([self.timeline.parts()])
        if self.is_world_process_zero() and self.timeline.steps:
            names = dict.fromkeys(name for parts in processes for name in parts)
            parts = {name: sum(own.get(name, 0.0) for own in processes) / len(processes) for name in names}
            title = f"time line: mean of {self.timeline.steps} steps, {len(processes)} x {self.args.device.type}"
            self.console.print(timeline_table(parts, self.timeline.steps, title))

    def _set_aside_earlier_run(self) -> None:
        """A run that is not resumed must not find another's checkpoints and evaluations beside its own."""
        earlier, self._earlier_run = [path for path in self._earlier_run if path.exists()], []
        if not earlier:
            return
        output = Path(self.args.output_dir)
        number = next(i for i in itertools.count(1) if not (output / f"earlier-{i}").exists())
        aside = output / f"earlier-{number}"
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        self.console.print(f"{output} holds an earlier run: its checkpoints and evaluations are in {aside} now.")

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended: Trainer takes one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    @staticmethod
    def _checked_checkpoint(args, checkpoint: str | bool | None) -> str | None:
        """The folder to resume from; a ValueError where there is none, or it is not a checkpoint."""
        if checkpoint in (None, False, "", "False", "false"):
            return None
        if checkpoint in (True, "True", "true"):
            last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
            if last is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but output_dir={args.output_dir!r} holds no checkpoint."
                )
            return last
        if not os.path.isfile(os.path.join(checkpoint, "policy.json")):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is not a checkpoint of this package (no policy.json in it); "
                "pass an output_dir/checkpoint-N folder, or True for the last one."
            )
        return str(checkpoint)

    def _policy_identity(self) -> dict:
        """What a checkpoint must agree with: trainer, pipeline, denoisers' architecture, and how data is counted."""
        return {
            "trainer": self._name,
            "model": self.model_name,
            "pipeline": type(self.pipeline).__name__,
            "denoisers": {name: _architecture(module) for name, module in self.policy.denoiser.items()},
            "weights": self._weights,
            "lora_scale": {name: _lora_scale(module) for name, module in self.policy.denoiser.items()},
            "batches": {name: getattr(self.args, name) for name in self._position_settings},
        }

    def _check_same_model(self, checkpoint: str) -> None:
        saved = json.loads((Path(checkpoint) / "policy.json").read_text())
        own = self._policy_identity()
        if saved.get("trainer", self._name) != self._name:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is a run of {saved['trainer']}, not of {self._name}: resume "
                "it with the trainer that wrote it."
            )
        if (saved["pipeline"], saved["denoisers"]) != (own["pipeline"], own["denoisers"]):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is of another model: {saved['pipeline']} from "
                f"{saved['model']!r}, while this run trains {own['pipeline']} from {own['model']!r}."
            )
        differences = (("weights", "other base weights"), ("lora_scale", "another lora_alpha or other lora_denoisers"))
        for key, what in differences:
            if saved.get(key, own[key]) != own[key]:  # a checkpoint of before this was kept has none
                raise ValueError(
                    f"resume_from_checkpoint={checkpoint!r} was trained on {what} than this run's: the adapter would "
                    f"mean something else. It was made from {saved['model']!r}."
                )
        for name, value in own["batches"].items():
            if saved["batches"][name] != value:
                raise ValueError(
                    f"{name}={value}, but resume_from_checkpoint={checkpoint!r} was saved with "
                    f"{saved['batches'][name]}: the position in the data would be another. Keep it, or start anew."
                )

    def _save_checkpoint(self, model, trial) -> None:
        """Write into a staging folder and rename it: what is named checkpoint-N is always complete."""
        self.check_equal_weights()
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        staging = final.with_name(f".incomplete-{final.name}")
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        error = None
        with self.stage("saving"):
            try:
                self._write_checkpoint(staging)
            except (OSError, SafetensorError) as caught:
                error = f"rank {self.accelerator.process_index}: {caught}"
            errors = [e for e in gather_object([error]) if e]
            if errors:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)
                last = get_last_checkpoint(self.args.output_dir) or "none"
                raise OSError(
                    f"checkpoint {final} could not be written ({'; '.join(errors)}). Earlier checkpoints are whole "
                    f"(the last: {last}); free some space, or lower save_total_limit, and resume from it."
                )
            if self.args.should_save:
                old = final.with_name(f".incomplete-old-{final.name}")
                if final.exists():  # resumed from an earlier one
                    os.replace(final, old)
                os.replace(staging, final)
                shutil.rmtree(old, ignore_errors=True)
                rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=self.args.save_total_limit,
                                   best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True)
            self._wait()

    def _write_checkpoint(self, folder: Path) -> None:
        optimizer = None if self.args.save_only_model else self.optimizer.state_dict()  # of all ranks
        folder.mkdir(parents=True, exist_ok=True)
        save_tree(random_state(), folder / f"random_{self.accelerator.process_index}")
        if not self.args.should_save:
            return
        with self.ema or contextlib.nullcontext():
            save_lora(self.pipeline, folder)
        if not self.args.save_only_model:
            save_tree(optimizer, folder / "optimizer")
            save_tree(self.lr_scheduler.state_dict(), folder / "scheduler")
        save_tree(self._extra_state(), folder / "trainer")
        own = [*self.callback_handler.callbacks, self.control]
        for callback in [c for c in own if isinstance(c, ExportableState)]:
            self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "policy.json").write_text(json.dumps(self._policy_identity(), indent=2))

    def _extra_state(self) -> dict:
        """State of the trainer beyond adapter, optimizer and schedule; subclasses add theirs."""
        averages = {"ema": self.ema, "consistency": self.consistency and self.consistency.average}
        states = {name: None if average is None else average.state_dict() for name, average in averages.items()}
        return states | {"micro_batches": self._step}

    def _load_extra_state(self, state: dict) -> None:
        self._step = state["micro_batches"]
        if self.consistency is not None and state.get("consistency") is not None:
            self.consistency.average.load_state_dict(state["consistency"])
        elif self.consistency is not None:
            self.consistency.average.restart()
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            self.ema.restart()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_lora_state(self.pipeline, resume_from_checkpoint)
        self._load_extra_state(load_tree(Path(resume_from_checkpoint) / "trainer"))

    def _load_best_model(self) -> None:
        load_lora_state(self.pipeline, self.state.best_model_checkpoint)
        if self.ema is not None:  # what was saved there is the average
            self.ema.restart()
        self._best_step = self.state.best_global_step
        if self.is_world_process_zero():
            self.last_evaluation = read_evaluation(
                Path(self.args.output_dir) / "evaluations" / f"step_{self._best_step:06d}.json"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / "optimizer.json").exists():
            raise ValueError(
                f"{checkpoint} was saved with save_only_model=True: it has no optimizer state to resume from."
            )
        self.optimizer.load_state_dict(load_tree(folder / "optimizer"))
        self.lr_scheduler.load_state_dict(load_tree(folder / "scheduler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint) / f"random_{self.accelerator.process_index}"
        if path is not None and path.with_suffix(".json").exists():
            restore_random_state(load_tree(path))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter to a folder (output_dir by default), reload it in a fresh pipeline and compare its output.

        Where ranks share weights or tokens, the file is read back and compared with the adapter instead.
        With `push_to_hub` the folder's adapter, model card and samples are uploaded afterwards.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.is_world_process_zero():
            with self.ema or contextlib.nullcontext():
                self._write_adapter(folder)
                images = images_of(self.train_dataset[:1], self.image_columns)
                call = {"prompt": ["a video"], "num_inference_steps": 2} | self.policy.pipeline_kwargs
                call |= {name: image for name, (image,) in images.items()}
                dtypes = {next(module.parameters()).dtype for module in self.policy.denoiser.values()}
                half = self.args.bf16 or not dtypes <= {torch.float32, torch.float64}
                if self._calls_together:  # no rank can run a pipeline alone
                    check_saved_weights(self.pipeline, folder)
                    checked = "read back, equal to the trained one"
                else:
                    difference = check_saved_lora(self.pipeline, folder, call, 5e-2 if half else 1e-4)
                    checked = f"reloaded in a fresh pipeline, relative difference {difference:.1e}"
            self.create_model_card()
            self.console.print(f"adapter in {folder}; {checked}")
        self._wait()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _write_adapter(self, folder: Path) -> None:
        """Files appear whole or not at all: an earlier adapter in the folder is not lost to a full disk."""
        staging = folder / ".incomplete-adapter"
        try:
            for path in save_lora(self.pipeline, staging):
                final = folder / path.relative_to(staging)
                final.parent.mkdir(exist_ok=True)
                os.replace(path, final)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the adapter could not be written to {folder} ({error}). What was there before is whole, and so are "
                "the checkpoints; free some space and call save_model again, or resume."
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **kwargs) -> None:
        if not self.is_world_process_zero():
            return
        report = Path(self.args.output_dir) / "report.json"
        comparison = json.loads(report.read_text())["comparison"] if report.exists() else None
        call = {"num_inference_steps": self.args.num_inference_steps} | self.policy.pipeline_kwargs
        guider_scale = call.pop("guidance_scale", None) if has_guider(self.pipeline) else None
        card = hub.model_card(
            base_model=str(self.model_name), trainer=self._name, pipeline_class=type(self.pipeline).__name__,
            settings=self._card_settings(), comparison=comparison, folder=Path(self.args.output_dir),
            call=call, guider_scale=guider_scale, images=self.image_columns, still=self.policy.makes_images,
        )
        (Path(self.args.output_dir) / "README.md").write_text(card)

    def _card_settings(self) -> dict:
        names = ("learning_rate", "max_steps", "num_inference_steps", "guidance_scale", "seed")
        settings = {"rewards": ", ".join(self.rewards.names) or "none"} | {n: getattr(self.args, n) for n in names}
        if self.consistency is not None:
            settings["consistency distillation"] = f"weight {self.args.consistency_weight}"
        return settings

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs):
        """Upload adapter, model card and sample videos from output_dir; returns the repository's address."""
        url = None
        if self.is_world_process_zero():
            url = hub.push_adapter(
                self.args.output_dir, self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name,
                private=self.args.hub_private_repo, token=self.args.hub_token, commit_message=commit_message,
                revision=self.args.hub_revision,
            )
        return broadcast_object_list([url])[0]


def _architecture(module: nn.Module) -> str:
    """A digest of a module's config, without where it was loaded from."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _weights_digest(module: nn.Module) -> str:
    """A digest of some of a module's own weights, the same in fp32 and bf16."""
    weights = [p for name, p in sorted(module.named_parameters()) if "lora_" not in name]
    some = weights[:: max(1, len(weights) // 8)]
    parts = [p.detach().flatten()[:256].float().cpu().bfloat16().float() for p in some]
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()


def _lora_scale(module: nn.Module) -> list[float]:
    return sorted({config.lora_alpha / config.r for config in getattr(module, "peft_config", {}).values()})


def _as_floats(values: list[float | Tensor]) -> list[float]:
    """Metrics stay on their device until they are logged, so that no step waits for one."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    known = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(known) if isinstance(value, Tensor) else value for value in values]


def _with_none(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]
