"""Settings that all trainers share: the pipeline call, memory, data, evaluation and output files."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...estimate import Held
from ...policy.fast.fp8 import check_device
from ...policy.pipeline.offload import OFFLOADED
from ...policy.pipeline.rules import check_call
from ...run_files import ADAPTERS, listed
from ._trl import _BaseConfig
from .distributed.launch import check_processes, requested_sharding
from .setup.inherited_settings import check_inherited

OFFLOAD = (*OFFLOADED, "rewards")  # allowed values of `offload`
STEPS = 16  # default denoising steps, if neither the config nor an embedded model sets them
CALL = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")


@dataclass
class VideoPolicyConfig(_BaseConfig):
    """Settings of every trainer of a video policy, in addition to `transformers.TrainingArguments`."""

    without_effect: ClassVar[dict[str, str]] = {}  # {inherited field that has no effect: what to do instead}

    # --- the policy: how a video is sampled ---
    num_inference_steps: int | None = field(
        default=None,
        metadata={
            "help": "Denoising steps per video. Fewer train faster at lower sample quality. Unset: the default of an "
            "embedded model, otherwise 16."
        },
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Classifier-free guidance scale, in sampling and update. Unset: the model's default."},
    )
    height: int | None = field(
        default=None, metadata={"help": "Height of the videos in pixels. Unset: the model's default."}
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of the videos in pixels. Unset: the model's default."}
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "Length of the videos in frames. Unset: the model's default."}
    )
    pipeline_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the pipeline's call, as a dict or JSON, for instance "
            '{"max_sequence_length": 226, "negative_prompt": "blurry"}.'
        },
    )

    # --- how the denoiser runs, in sampling and update alike ---
    attention_kernel: str | None = field(
        default=None,
        metadata={
            "help": "Preferred attention kernel of the denoiser: cudnn (fastest on Hopper), flash, efficient or "
            "math. Unset: torch chooses."
        },
    )
    recompute: str = field(
        default="all_but_attention",
        metadata={
            "help": "What the backward pass recomputes with torch_compile and gradient_checkpointing: "
            "'all_but_attention', or 'everything' (slower, uses less memory)."
        },
    )

    base_precision: str | None = field(
        default=None,
        metadata={
            "help": "'fp8' stores and multiplies the frozen attention and feed-forward projections in FP8 (e4m3), in "
            "sampling and update alike. It halves their memory, is faster with torch_compile, and needs an NVIDIA "
            "GPU of the Ada or Hopper generation or newer. Unset: the precision of the weights."
        },
    )

    # --- memory ---
    offload: list[str] | None = field(
        default=None,
        metadata={
            "help": "Components to keep in host memory while they are idle, any of text_encoder, vae, rewards and "
            "denoiser. Use denoiser for a pipeline with several denoisers, or if one denoiser does not fit beside "
            "the other components. Unset: none."
        },
    )

    # --- how the VAE decodes ---
    vae_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the VAE alone, float32 or bfloat16. Unset: that of the run (bfloat16 with bf16)."
        },
    )
    vae_slicing: bool = field(
        default=False,
        metadata={"help": "Decode one video at a time to save memory. The videos change only by rounding."},
    )
    vae_tiling: bool = field(
        default=False,
        metadata={"help": "Decode large frames in overlapping tiles to save memory. The videos change slightly."},
    )

    vae_chunk_frames: int | None = field(
        default=None,
        metadata={
            "help": "Latent frames that Wan's VAE decodes at a time. More are faster and use more memory. Unset: 1, "
            "as in diffusers."
        },
    )
    vae_compile: bool = field(
        default=False,
        metadata={"help": "With vae_chunk_frames, compile the VAE's decoder. The first videos wait for compilation."},
    )
    vae_cudnn_benchmark: bool = field(
        default=False,
        metadata={
            "help": "With vae_chunk_frames, let cuDNN time its kernels while the VAE decodes, and take the fastest. "
            "It uses more memory, and a resumed run may differ by rounding."
        },
    )

    # --- data, rewards, weights ---
    image_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Dataset columns with one image per row (PIL images, paths or tensors), passed to the pipeline "
            "as arguments of the same names. Unset: `image`, if the pipeline's call has that argument."
        },
    )
    shuffle_dataset: bool = field(
        default=True,
        metadata={"help": "Shuffle the training prompts in each epoch. Set False to keep the dataset's order."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the rewards in their sum, one per reward. Unset: 1 each."}
    )
    reward_device: str | None = field(
        default=None,
        metadata={
            "help": "Device of rewards and judges, for instance cuda:1, to keep them off the policy's GPU. Separate "
            "several devices by commas; the processes of a host take turns through the list. Unset: each reward "
            "chooses its device."
        },
    )
    reward_timeout: float = field(
        default=1200.0,
        metadata={
            "help": "Seconds that one reward may take for a batch. A slower reward ends the run with an error that "
            "names it and the rank. On several processes it must be below ddp_timeout. 0: no limit."
        },
    )
    lora_denoisers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Denoisers to train, with an adapter or (peft_config='full') whole, for instance "
            '["transformer_2"], the low-noise expert of Wan 2.2. A denoiser learns only from trained steps that '
            "call it. Unset: all."
        },
    )
    continue_from: str | None = field(
        default=None,
        metadata={
            "help": "A saved LoRA to train further: a folder written by a trainer, diffusers or peft, a file in "
            "diffusers' layout, or a Hub id. It keeps its rank, alpha and target modules. Unset: a new adapter."
        },
    )
    continue_reference: str = field(
        default="base",
        metadata={
            "help": "With continue_from, the reference policy of the KL penalty and of auxiliary losses: 'base' (the "
            "model without an adapter) or 'adapter' (the model with the saved adapter)."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay per optimizer step of an exponential moving average of the trained weights, for instance "
            "0.95. If set, the average is evaluated and saved instead of the latest weights. Unset: no average."
        },
    )

    # --- many processes ---
    context_parallel: int = field(
        default=1,
        metadata={
            "help": "Processes that share the tokens of each video (diffusers' Ulysses attention), for videos too "
            "long for one GPU. Must divide the number of processes and the denoiser's heads and tokens."
        },
    )
    equal_weights_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between checks that all processes hold bitwise equal weights; a check also "
            "precedes each checkpoint. Lower it to find the step at which processes diverge."
        },
    )

    # --- evaluation and output files ---
    eval_seed: int = field(
        default=42,
        metadata={"help": "Seed of the evaluation noise, the same in every evaluation. Keep it to compare runs."},
    )
    num_sample_videos: int = field(
        default=8,
        metadata={
            "help": "Videos that each evaluation writes to samples/ as mp4 files and an image sheet, and logs to the "
            "trackers. 0: none."
        },
    )
    trace_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps that each process records in output_dir/trace_rank{r}.json for chrome://tracing "
            "or Perfetto. Set it to see where the time of a step goes. 0: none."
        },
    )
    fps: int = field(default=8, metadata={"help": "Frames per second of the written videos."})

    # --- TrainingArguments with other defaults ---
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Initial learning rate of the trained weights (the adapter, by default)."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: every column of the dataset reaches the rewards."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Optimizer steps between logs; below 1, a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave NaN and infinite losses out of the logged mean. If True, every micro-batch waits for the "
            "GPU to finish."
        },
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Trackers that log scalars and videos: tensorboard, wandb, trackio."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Evaluate once before training, if there is an eval_dataset."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # Hide these from accelerate, which would compile the policy as a whole. policy/fast/execution.py compiles its
        # blocks instead.
        compiled = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if self.report_to is None:  # transformers would read None as the name of an integration
            self.report_to = "none"
        with warnings.catch_warnings():  # TRL sets the deprecated field, under the name that TRL users know
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
            super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = compiled
        self.torch_compile = self.torch_compile or any(compiled[1:])
        check_inherited(self)
        check_processes(self)
        requested_sharding(self)  # fail before the trainer or its caller loads a pipeline
        if self.recompute not in ("all_but_attention", "everything"):
            raise ValueError(f"recompute={self.recompute!r} must be 'all_but_attention' or 'everything'.")
        if self.base_precision not in (None, "fp8"):
            raise ValueError(f"base_precision={self.base_precision!r} must be 'fp8', or unset.")
        if self.base_precision == "fp8":
            check_device(self.device)
        if self.vae_cudnn_benchmark and self.full_determinism:
            raise ValueError("vae_cudnn_benchmark chooses kernels by their time, which full_determinism excludes.")
        self._read_pipeline_kwargs()
        check_call(self.policy_kwargs())
        if isinstance(self.offload, str) or set(self.offload or ()) - set(OFFLOAD):
            raise ValueError(f"offload={self.offload!r} must be a list with any of {list(OFFLOAD)}, or unset.")
        self.own_reward_device()  # fail now, not after the model is loaded
        if self.continue_reference not in ("base", "adapter"):
            raise ValueError(f"continue_reference={self.continue_reference!r} must be 'base' or 'adapter'.")
        if self.continue_reference == "adapter" and not self.continue_from:
            raise ValueError("continue_reference='adapter' needs continue_from: the saved adapter to refer to.")
        self._check_start_stays()
        if self.fp16:
            raise ValueError("fp16=True is not supported: per-sample losses lose too many digits. Use bf16 or fp32.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, for instance 0.95.")
        if self.reward_timeout < 0 or (self.world_size > 1 and self.reward_timeout >= self.ddp_timeout):
            raise ValueError(
                f"reward_timeout={self.reward_timeout:g} must be 0 (no limit) or, on several processes, between 0 and "
                f"ddp_timeout={self.ddp_timeout}: after ddp_timeout the other ranks fail with an error that names the "
                "rank but not the reward. Lower reward_timeout, or raise ddp_timeout."
            )
        if self.context_parallel < 1 or self.world_size % self.context_parallel:
            raise ValueError(
                f"context_parallel={self.context_parallel} must be at least 1 and divide the number of processes, "
                f"{self.world_size}."
            )
        if self.equal_weights_steps < 1:
            raise ValueError(f"equal_weights_steps={self.equal_weights_steps} must be at least 1 optimizer step.")
        self._check_steps(STEPS if self.num_inference_steps is None else self.num_inference_steps)
        if self.trace_steps < 0:
            raise ValueError(f"trace_steps={self.trace_steps} must not be negative; 0 writes no trace.")

    def objective(self) -> tuple[str, ...]:
        """Names of the method's settings; a run resumed with other values reports the change."""
        return ()

    def uses_reference(self) -> bool:
        """Whether the method's loss uses a reference policy."""
        return False

    def held(self) -> Held:
        """What the method holds on a device, for `estimate_memory`; valid after `settle_call`."""
        videos = self.per_device_train_batch_size
        return Held(sampled=videos, trained=videos, prompts=videos)

    def _check_start_stays(self) -> None:
        """Raise a ValueError if `continue_from` lies in output_dir, where this run moves or replaces it."""
        start, output = Path(self.continue_from or ""), Path(self.output_dir).resolve()
        if not self.continue_from or not start.exists() or not start.resolve().is_relative_to(output):
            return
        inside, files = start.resolve().relative_to(output), listed(output)
        if files is None:
            moves = not inside.parts or inside.parts[0].startswith("checkpoint-")
            moves = moves or len(inside.parts) == 1 and start.is_file()
        else:  # saving moves any adapter directly in the folder
            moves = str(inside) in (".", ADAPTERS[0]) or any(
                inside.is_relative_to(path) or Path(path).is_relative_to(inside) for path in files
            )
        if moves:
            raise ValueError(
                f"continue_from={self.continue_from!r} lies in output_dir={self.output_dir!r}, and this run would "
                "replace the adapter and checkpoints there; choose another output_dir. To resume an interrupted run, "
                "set resume_from_checkpoint instead."
            )

    @property
    def data_parts(self) -> int:
        """Number of parts that the videos are divided into: processes, or groups that share each video's tokens."""
        return self.world_size // self.context_parallel

    def _read_pipeline_kwargs(self) -> None:
        if isinstance(self.pipeline_kwargs, str):
            try:
                self.pipeline_kwargs = json.loads(self.pipeline_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"pipeline_kwargs={self.pipeline_kwargs!r} is not JSON ({error}); write it like "
                    "'{\"max_sequence_length\": 226}'."
                ) from error
        if not isinstance(self.pipeline_kwargs, dict | None):
            raise ValueError(f"pipeline_kwargs={self.pipeline_kwargs!r} must be a dict of the pipeline's arguments.")

    def _check_steps(self, steps: int) -> None:
        """Raise a ValueError if a setting does not fit this number of denoising steps."""
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be at least 1.")

    def settle_call(self, defaults: dict) -> None:
        """Fill unset arguments of the pipeline's call from `defaults` (`assets.call_defaults`).

        `num_inference_steps` is always set afterwards: `STEPS` if nothing else says how many.

        Raises:
            ValueError: a setting does not fit the number of denoising steps.
        """
        given: Any = self.pipeline_kwargs or {}
        for name in CALL:
            if getattr(self, name) is None and name not in given:
                setattr(self, name, defaults.get(name))
        self.pipeline_kwargs = {n: v for n, v in defaults.items() if n not in CALL} | given
        self.num_inference_steps = self.num_inference_steps or STEPS
        self._check_steps(self.num_inference_steps)

    def videos_a_step(self) -> str:
        """Describe in words how many videos are sampled, and how often."""
        videos = self.per_device_train_batch_size * self.data_parts * self.gradient_accumulation_steps
        return f"each optimizer step samples {videos} videos"

    def own_reward_device(self) -> torch.device | None:
        """Return this process's device out of `reward_device`, or None if it is unset.

        Raises:
            ValueError: a device in the list does not exist on this host.
        """
        if self.reward_device is None:
            return None
        devices = []
        for name in self.reward_device.split(","):
            try:
                devices.append(torch.device(name.strip()))
                here = torch.get_device_module(devices[-1]).device_count()
            except RuntimeError as error:
                raise ValueError(f"reward_device={self.reward_device!r}: {name!r} is not a device: {error}") from error
            if (devices[-1].index or 0) >= here:
                raise ValueError(
                    f"reward_device={self.reward_device!r}: this host has no {name}, only {here} such device(s)."
                )
        return devices[self.local_process_index % len(devices)]

    def policy_kwargs(self) -> dict:
        """Return the arguments of the pipeline's call that this config sets."""
        given: Any = self.pipeline_kwargs or {}
        call = dict(given)
        for name in CALL[1:]:
            if getattr(self, name) is not None:
                call[name] = getattr(self, name)
        return call

    def policy_settings(self) -> dict:
        """Return the arguments of `VideoPolicy`."""
        return {
            "num_inference_steps": self.num_inference_steps or STEPS,
            "pipeline_kwargs": self.policy_kwargs(),
            "autocast_dtype": torch.bfloat16 if self.bf16 else None,
            "attention_kernel": self.attention_kernel,
            "vae_dtype": self.vae_dtype,
            "vae_slicing": self.vae_slicing,
            "vae_tiling": self.vae_tiling,
            "vae_chunk_frames": self.vae_chunk_frames,
            "vae_compile": self.vae_compile,
            "vae_cudnn_benchmark": self.vae_cudnn_benchmark,
        }
