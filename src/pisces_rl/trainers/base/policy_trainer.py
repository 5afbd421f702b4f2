"""Base class of all trainers of video policies: setup, evaluation, training loop, saving and resume."""

import contextlib
import copy
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ... import assets, hub, media
from ...policy import (
    FULL,
    FullWeights,
    TrainedLoRA,
    VideoPolicy,
    check_lora_config,
    lora_parameters,
    parts_of_values,
    read_adapter,
    set_adapter,
)
from ...rewards import RewardPanel
from ...rewards.contract import RewardFuncs
from ...run_files import RunFiles
from ...transitions import Paper
from ..auxiliary.auxiliary_loss import AuxiliaryLoss, check_auxiliary_losses
from ._trl import LoopOnlyTrainer, identity
from .config import VideoPolicyConfig
from .data.images import check_images, image_columns, images_of
from .data.video_data import undecoded
from .distributed.gradients import ExpertGradients, average_gradients
from .distributed.launch import requested_sharding, spread_policy
from .distributed.ranks import Ranks
from .distributed.zero import requested_zero
from .run.adapter_files import check_adapter, write_adapter, write_card
from .run.checkpoint import load_tree, remove_incomplete, save_tree
from .run.evaluation import Evaluator
from .run.report import run_console
from .run.resume import last_checkpoint, requested_checkpoint, run_identity
from .run.run_checkpoints import RunCheckpoints
from .run.run_report import RunReport
from .setup.checks import (
    check_dataset,
    check_full_fine_tuning,
    check_output_dir,
    check_reference,
    checked_weights,
    settle_evaluation,
)
from .setup.initial import InitialPolicy, InitialWeights
from .setup.load_pipeline import check_unused, freeze, load_pipeline
from .watch.callbacks import AdapterEMA, StageProgress
from .watch.plan import memory_plan, step_plan
from .watch.timeline import Timeline, TimelineSteps, print_timeline
from .watch.training_metrics import as_floats, merged_over_processes


class VideoPolicyTrainer(LoopOnlyTrainer):
    """A TRL trainer whose model is a `VideoPolicy`, trained through a LoRA adapter or by full fine-tuning.

    Args:
        model: a diffusers text-to-video pipeline without adapters, a Hub id, a folder, or an embedded model's name.
        reward_funcs: reward callables to train on, see `pisces_rl.rewards.contract`.
        args: a config.
        train_dataset: a dataset with a column `prompt`. The rewards get all other columns (a `datasets.Video` column
            as its file, {"path", "bytes"}), and the pipeline gets those in args.image_columns.
        eval_dataset: a dataset for evaluation, or {name: dataset}. Its noise is the same in every evaluation.
        judge_funcs: reward callables that are only measured, on the evaluation set.
        peft_config: a `peft.LoraConfig`. None: rank 16 on attention and feed-forward projections or, with
            args.continue_from, the saved configuration. "full": train all weights of the denoisers (of those in
            args.lora_denoisers) in fp32, without an adapter, and save them as components of a pipeline.
        callbacks: additional callbacks.
        auxiliary_losses: `AuxiliaryLoss` objects to add to the method's loss, for instance
            [ConsistencyDistillation(videos, weight=0.1)].
    """

    args: VideoPolicyConfig
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL declares None
    papers: tuple[Paper, ...] = ()  # the method's papers, cited in the model card
    _rewards_optional = False  # whether the trainer can run without rewards
    _warned_of_frozen = False
    _position_settings: tuple[str, ...] = ()  # settings that determine the position in the data

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFuncs,
        args: VideoPolicyConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        judge_funcs: RewardFuncs = None,
        peft_config: LoraConfig | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        auxiliary_losses: list[AuxiliaryLoss] | None = None,
    ):
        args = copy.copy(args)  # the caller may pass the same object to another trainer
        args.output_dir = os.path.abspath(args.output_dir)  # a reward or a notebook may change the working directory
        sharding, zero_stage = requested_sharding(args), requested_zero(args)
        check_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            check_dataset("eval_dataset", eval_dataset, several=True)
        train_dataset, eval_dataset = undecoded(train_dataset), undecoded(eval_dataset)
        self.rewards, self.judges = (
            RewardPanel(funcs, args.reward_timeout, args.own_reward_device()) for funcs in (reward_funcs, judge_funcs)
        )
        check_auxiliary_losses(auxiliary_losses or [])
        self.auxiliary_losses = [copy.copy(loss) for loss in auxiliary_losses or []]
        self._uses_reference = args.uses_reference() or any(loss.uses_reference for loss in self.auxiliary_losses)
        check_reference(args, self._uses_reference)
        if args.num_sample_videos:
            media.check_mp4(args.fps)
        self.reward_weights = checked_weights(args.reward_weights, self.rewards, self._rewards_optional)
        settle_evaluation(args, eval_dataset, self.rewards)
        full = peft_config == FULL
        if full:
            check_full_fine_tuning(args, sharding, zero_stage)
        elif peft_config is not None:
            check_lora_config(peft_config)
        continued = read_adapter(args.continue_from) if args.continue_from else None
        if continued is not None:
            continued.check_asked(peft_config)
        requested_checkpoint(args.output_dir, args.resume_from_checkpoint)
        check_output_dir(args.output_dir)

        set_seed(args.seed)  # all processes initialise the LoRA alike
        self.model_name = (
            str(model)
            if isinstance(model, (str, os.PathLike))
            else (str(getattr(model, "name_or_path", "") or type(model).__name__))
        )
        args.settle_call(assets.call_defaults(self.model_name))
        self.pipeline = load_pipeline(model, torch.bfloat16 if args.bf16 else torch.float32)
        self.image_columns = image_columns(self.pipeline, args.image_columns)
        check_images("train_dataset", train_dataset, self.image_columns)
        if eval_dataset is not None:
            check_images("eval_dataset", eval_dataset, self.image_columns)
        check_unused(self.pipeline, args.base_precision)
        if args.process_index == 0:
            self._memory_plan = memory_plan(self.pipeline, args, peft_config)
        self.policy = VideoPolicy(self.pipeline, **args.policy_settings())
        freeze(self.pipeline, args.device)
        denoisers = dict(self.policy.denoiser.items())
        self.trained = (
            FullWeights(denoisers, args.lora_denoisers)
            if full
            else TrainedLoRA(denoisers, peft_config, args.lora_denoisers, continued)  # type: ignore[arg-type]
        )
        self.adapted_modules = self.trained.modules
        self.policy.set_base_precision(args.base_precision)
        self._identity = run_identity(
            self._name,
            self.model_name,
            self.policy,
            args,
            self._position_settings,
            self.auxiliary_losses,
            self.rewards,
        )
        if args.torch_compile:
            self.policy.compile_blocks(
                args.recompute if args.gradient_checkpointing else "nothing",
                args.torch_compile_backend or "inductor",
                args.torch_compile_mode,
            )
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs need several processes, never DataParallel

        self.progress = StageProgress()
        self.timeline = Timeline(args.device, args.process_index, args.trace_steps)
        self.policy.record_with(self.timeline.span)
        self.rewards.record = self.judges.record = self.timeline.span
        self._metrics: dict[str, dict[str, list]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step = 0  # micro-batches so far
        self.files = RunFiles(args.output_dir, self.pipeline.components)
        self.checkpoints = RunCheckpoints(self.files, self._identity, args.process_index, args)
        self._files_elsewhere: dict[Path, RunFiles] = {}
        own = [TimelineSteps(self.timeline), self.progress]
        super().__init__(
            model=self.policy,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[*own, *(callbacks or [])],
        )
        self.ranks = Ranks(self.accelerator, args.ddp_timeout)
        self.evaluator = Evaluator(
            self.policy,
            self.rewards,
            self.judges,
            self.reward_weights,
            self.image_columns,
            self.ranks,
            self.progress.stage,
            args,
        )
        self.report = RunReport(
            self.evaluator,
            self.files,
            self.timeline,
            self.callback_handler,
            self.is_world_process_zero(),
            args,
            self._identity,
        )
        spread_policy(self.policy, self.accelerator, args, sharding, zero_stage)
        self.adapter = lora_parameters(denoisers)  # only now: sharding replaces the parameters of full fine-tuning
        if full:
            compares = eval_dataset is not None and args.num_sample_videos > 0
            self.initial: InitialWeights | InitialPolicy = InitialWeights(
                self.adapter,
                self.trained,  # type: ignore[arg-type]
                kept=self._uses_reference or (compares and (self._calls_together or args.process_index == 0)),
            )
        else:
            self.initial = InitialPolicy(self.policy, self.adapter, continued, args.continue_reference)
        self._identity |= self.initial.identity
        self.expert_gradients = ExpertGradients(self.adapter, list(self.adapted_modules))
        for panel in (self.rewards, self.judges) if "rewards" in (args.offload or ()) else ():
            panel.offload(self.accelerator.device)
        self.ema = AdapterEMA(self.adapter, args.ema_decay) if args.ema_decay else None
        if self.ema is not None:
            self.add_callback(self.ema)
        for loss in self.auxiliary_losses:
            loss.begin(
                self.policy,
                self.adapter,
                seed=args.seed,
                image_columns=self.image_columns,
                reference=self.initial.reference,
            )
            self.add_callback(loss)
        self.console = run_console()
        if self.is_world_process_zero():
            total = sum(p.numel() for p in self.adapter.values())
            self.console.print(f"{self.trained.description}, {total / 1e6:.2f} M trainable parameters")
        if args.should_save:
            remove_incomplete(args.output_dir)

    @contextlib.contextmanager
    def stage(self, name: str, whole: bool = False) -> Iterator[None]:
        """Show the stage on the progress bar and count its seconds on the time line.

        A `whole` stage includes the seconds of stages inside it.
        """
        self.progress.stage(name)
        with self.timeline.span(name, whole):
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(key.startswith("eval") for key in logs):
            own = {name: as_floats(values) for name, values in self._metrics["train"].items()}
            own |= {"loss": [logs["loss"]]} if "loss" in logs else {}
            own |= {f"seconds/{part}": [seconds] for part, seconds in self.timeline.read().items()}
            logs.update(merged_over_processes(own, self.accelerator.num_processes))
            self._metrics["train"].clear()
        super().log(logs, start_time)
        self.report.list_event_files()

    def backward_auxiliary_losses(self) -> Tensor:
        """Back-propagate the auxiliary losses of one micro-batch; return their weighted sum, detached."""
        total, part = torch.zeros((), device=self.accelerator.device), (self.data_part, self.args.data_parts)
        for auxiliary in self.auxiliary_losses:
            with self.stage(auxiliary.name, whole=True):
                count = auxiliary.batch_size or self.args.per_device_train_batch_size
                loss = auxiliary.loss(self._step, count, part).mean()
                self._metrics["train"][f"{auxiliary.name}_loss"].append(loss.item())
                loss = auxiliary.weight * loss / self.current_gradient_accumulation_steps
                self.backward_loss(loss)
            total += loss.detach()
        return total

    def backward_loss(self, loss: Tensor) -> None:
        """Back-propagate a loss. Warn once if no trained weight entered it, because the step's expert is frozen."""
        if loss.requires_grad:
            self.accelerator.backward(loss)
        elif not self._warned_of_frozen:
            self._warned_of_frozen = True
            warnings.warn(
                f"a trained denoising step calls only denoisers without an adapter, so it has no gradient "
                f"(optimizer step {self.state.global_step}). Train the steps of {' and '.join(self.adapted_modules)} "
                "(sde_window_range, train_levels), or more denoisers (lora_denoisers).",
                stacklevel=2,
            )

    # --- many processes ----------------------------------------------------------------------------------------------

    @property
    def data_part(self) -> int:
        """Index of the part of the videos, out of `args.data_parts`, that this process works on."""
        return self.accelerator.process_index // self.args.context_parallel

    @property
    def _calls_together(self) -> bool:
        """Whether several processes must call the policy at the same time."""
        return self.policy.mesh is not None or self.policy.shares_tokens

    def all_reduce_gradients(self) -> None:
        """Run `average_gradients` on the adapter. If several denoisers are trained, log the gradient norm of each."""
        if (step := self.state.global_step) % self.args.equal_weights_steps == 0:
            self.check_equal_weights()
        self.ranks.meet(f"to average gradients at optimizer step {step + 1}")
        average_gradients(self.adapter, self.accelerator, self.args.context_parallel, self.optimizer)
        if len(self.adapted_modules) > 1:
            for name, norm in self.expert_gradients.norms(step + 1, self.optimizer).items():
                self._metrics["train"][f"grad_norm/{name}"].append(norm)

    def check_equal_weights(self) -> None:
        """Check that all processes hold equal weights; a RankError names the ranks that do not."""
        self.ranks.meet(f"to compare weights after optimizer step {self.state.global_step}")
        whole = [p for p in self.adapter.values() if not isinstance(p, DTensor)]  # no other rank has a copy of a shard
        if whole:
            self.ranks.check_equal(whole)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample every evaluation prompt deterministically from fixed noise; score with rewards and judges.

        Args:
            eval_dataset: a dataset other than the trainer's, or {name: dataset}. Its samples go to
                samples/other_STEP, which the model card does not show. None: the trainer's eval_dataset.
            ignore_keys: has no effect; transformers passes it.
            metric_key_prefix: prefix of the returned names.

        Returns:
            The means `eval_reward`, `eval_rewards/{name}/mean`, `eval_judges/{name}/mean`, `eval_{extra}/mean` for
            per-sample values that rewards recorded, and `eval_{metric}` for their scalars (averaged over calls,
            weighted by their videos); with several datasets, `eval_{set}_...`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_dataset("eval_dataset", dataset, several=True)
        with self._saved_weights():
            metrics = self.report.evaluate(dataset, self.state, metric_key_prefix, own=eval_dataset is None)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def first_evaluation(self) -> dict | None:
        """Results of this object's first evaluation, {dataset: {"prompts", "scores"}}."""
        return self.report.first

    @property
    def last_evaluation(self) -> dict | None:
        """Results of the last evaluation, or of the best model's if that was loaded."""
        return self.report.last

    @property
    def _saved_step(self) -> int:
        """The optimizer step of the current weights."""
        return self.report.saved_step(self.state)

    def _saved_weights(self) -> contextlib.AbstractContextManager:
        """Return a context in which the weights are those to evaluate and save (the average, with ema_decay)."""
        return self.ema or contextlib.nullcontext()

    def _finish(self) -> None:
        """Run the last evaluation, and compare before with after."""
        if not self.report.is_current(self.state):
            self.evaluate()
        self.report.compare(
            self.eval_dataset,
            self.state,
            self.console,
            self._calls_together,
            self.initial.untrained,
            self._saved_weights,
        )
        self._wait()

    def _wait(self) -> None:
        self.accelerator.wait_for_everyone()

    # --- train, save, resume -----------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # nothing would be trained inside a caller's inference_mode
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; `resume_from_checkpoint` is a checkpoint folder, or True for the last one in output_dir."""
        self.report.begin()
        checkpoint = self.checkpoints.begin(resume_from_checkpoint)
        if checkpoint is not None:
            self.args.eval_on_start = False
        if self.args.should_save:  # with save_on_each_node, one process of every node
            aside = self.checkpoints.set_aside_earlier_run(checkpoint)
            if aside is not None and self.is_world_process_zero():
                self.console.print(f"{self.files.folder} held an earlier run; its files were moved to {aside}.")
            if self.args.trace_steps:
                self.files.claim(*(f"trace_rank{rank}.json" for rank in range(self.accelerator.num_processes)))
        if self.is_world_process_zero():
            for line in filter(None, (step_plan(self.policy, self.args), self._memory_plan)):
                self.console.print(line, highlight=False)
            for change in self._identity["changes"]:
                self.console.print(f"changed on resume: {change}", highlight=False)
        try:
            with self.checkpoints.limited():
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except KeyboardInterrupt:
            if self.is_world_process_zero():
                last = last_checkpoint(self.args.output_dir)
                advice = f"Resume with resume_from_checkpoint={last}" if last else "No checkpoint was written yet"
                self.console.print(f"\nInterrupted at step {self.state.global_step}. {advice}.", style="yellow")
            raise
        except RuntimeError as error:
            self.ranks.explain(error, f"after optimizer step {self.state.global_step}")
            raise
        finally:
            if self.args.trace_steps:
                self.timeline.leave_trace(self.args.output_dir)
        if self.eval_dataset is not None:
            with self.timeline.span("evaluation", whole=True):
                self._finish()
        self.timeline.stop()
        print_timeline(self.timeline, self.accelerator, self.console)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_equal_weights()
        with self.stage("saving", whole=True):
            self.checkpoints.save(self.state, self._write_checkpoint)
            self._wait()

    def _write_checkpoint(self, folder: Path) -> None:
        # Gather sharded tensors before writing anything: a rank that fails to write would miss later collectives.
        optimizer = None if self.args.save_only_model else self.optimizer.state_dict()
        extra = self._extra_state()
        with self._saved_weights():
            pipeline = self.trained.gathered(self.pipeline)
            folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.write_random_state(folder)
            if not self.args.should_save:
                return
            self.files.claim(f"checkpoint-{self.state.global_step}")
            self.trained.save(pipeline, folder)
        if not self.args.save_only_model:
            save_tree(optimizer, folder / "optimizer")
            save_tree(self.lr_scheduler.state_dict(), folder / "scheduler")
        save_tree(extra, folder / "trainer")
        self.checkpoints.write_state(folder, self.state, [*self.callback_handler.callbacks, self.control])

    def _extra_state(self) -> dict:
        """Return the state besides adapter, optimizer and schedule; subclasses add to it."""
        averages = {name: one.state_dict(weights=one is self.ema) for name, one in self._averages().items()}
        auxiliary = {loss.name: loss.state_dict() for loss in self.auxiliary_losses}
        return averages | {"auxiliary_losses": auxiliary, "micro_batches": self._step}

    def _load_extra_state(self, state: dict) -> None:
        self._step = state["micro_batches"]
        if state.get("ema") is not None:  # the adapter's file holds the average, not the trained weights
            set_adapter(self.adapter, parts_of_values(state["ema"]["weights"], self.adapter))
        auxiliary = state.get("auxiliary_losses", state)  # older checkpoints store the consistency term beside "ema"
        states: list[tuple[AuxiliaryLoss | AdapterEMA, dict | None]] = [
            *((loss, auxiliary.get(loss.name)) for loss in self.auxiliary_losses),
            *((average, state.get(name)) for name, average in self._averages().items()),
        ]
        for one, saved in states:
            if saved is None:
                one.restart()
            else:
                one.load_state_dict(saved)

    def _averages(self) -> dict[str, AdapterEMA]:
        return {} if self.ema is None else {"ema": self.ema}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.trained.load(self.pipeline, resume_from_checkpoint)
        self._load_extra_state(load_tree(Path(resume_from_checkpoint) / "trainer"))

    def _load_best_model(self) -> None:
        self.trained.load(self.pipeline, self.state.best_model_checkpoint)
        restarted: list[AuxiliaryLoss | AdapterEMA] = [*self.auxiliary_losses, *self._averages().values()]
        for one in restarted:
            one.restart()  # from here on, the loaded weights are evaluated and saved
        self.report.take_best(self.state.best_model_checkpoint, self.state.best_global_step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.read_optimizer(checkpoint, self.optimizer, self.lr_scheduler)

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, updates, epochs, checkpoint, trial)
        if checkpoint is not None:
            self.checkpoints.find_best(checkpoint, self.state)
        self.state.compute_steps(self.args, max_steps)  # the checkpoint's state has the intervals of the earlier run
        return position

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.checkpoints.read_random_state(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (or the fully trained denoisers) and the model card to a folder, output_dir by default.

        Then reload the weights in a fresh pipeline and compare its output. If ranks share weights or tokens, compare
        the file with the weights instead. With `push_to_hub`, upload the adapter, model card and samples afterwards.
        """
        folder = Path(output_dir or self.args.output_dir)
        with self._saved_weights():
            pipeline = self.trained.gathered(self.pipeline)
            if self.is_world_process_zero():
                write_adapter(pipeline, self.trained, self._files_of(folder))
                images = images_of(self.train_dataset[:1], self.image_columns)
                checked = check_adapter(
                    self.policy,
                    self.trained,
                    pipeline,
                    folder,
                    {name: image for name, (image,) in images.items()},
                    bf16=self.args.bf16,
                    alone=not self._calls_together,
                )
        if self.is_world_process_zero():
            self.create_model_card(output_dir=folder)
            saved = " and ".join(self.trained.components) or "adapter"
            self.console.print(f"saved {saved} to {folder}; {checked}")
            self.report.page.write(self.args, self.state)
        self._wait()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(output_dir=folder)

    def _files_of(self, folder: str | os.PathLike) -> RunFiles:
        folder, output = Path(folder).resolve(), self.files.folder.resolve()
        elsewhere = self._files_elsewhere
        return (
            self.files
            if folder == output
            else elsewhere.setdefault(folder, RunFiles(folder, self.pipeline.components))
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        output_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the model card with this run's results to a folder, output_dir by default.

        The file is README.md, or model_card.md if the folder has a README.md that the user wrote.
        """
        if not self.is_world_process_zero():
            return
        path = write_card(
            self._files_of(output_dir or self.args.output_dir),
            self.policy,
            self.trained,
            self.args,
            base_model=self.model_name,
            trainer=self._name,
            settings=self._card_settings(),
            comparison=self.report.comparison,
            samples_of=self._saved_step,
            images=self.image_columns,
            papers=[*self._cited(), *(paper for loss in self.auxiliary_losses for paper in loss.papers)],
        )
        if path.name != "README.md":
            self.console.print(f"{path.with_name('README.md')} is not this run's and was kept; the card is in {path}.")

    def _cited(self) -> tuple[Paper, ...]:
        """Return the papers that the model card cites for the method; GRPO adds those of its transition."""
        return self.papers

    def _card_settings(self) -> dict:
        names = ("learning_rate", "num_inference_steps", "guidance_scale", "seed")
        settings = {
            "rewards": ", ".join(self.rewards.names) or "none",
            "optimizer steps": f"{self._saved_step} of {self.state.max_steps}",
        }
        settings |= {n: getattr(self.args, n) for n in names}
        settings["sampler"] = self.policy.sampler
        if self._identity["changes"]:
            settings["changed on resume"] = "; ".join(self._identity["changes"])
        for loss in self.auxiliary_losses:
            settings |= loss.card_settings()
        return settings | self.initial.card_settings(self._uses_reference)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        output_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload adapter, model card and sample videos from a folder, output_dir by default.

        Returns:
            The URL of the repository.
        """
        url = None
        if self.is_world_process_zero():
            url = hub.push_adapter(
                output_dir or self.args.output_dir,
                self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
                private=self.args.hub_private_repo,
                token=self.args.hub_token,
                commit_message=commit_message,
                revision=self.args.hub_revision,
            )
        return broadcast_object_list([url])[0]
