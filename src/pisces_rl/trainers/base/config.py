"""What the configurations of all trainers share: the policy's call, evaluation, and what a run leaves."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from ...estimate import Held
from ...policy.fast.fp8 import check_device
from ...policy.pipeline.offload import OFFLOADED
from ...policy.pipeline.rules import check_call
from ...run_files import ADAPTERS, listed
from ._trl import _BaseConfig
from .distributed.launch import check_processes, requested_sharding
from .setup.inherited_settings import check_inherited

OFFLOAD = (*OFFLOADED, "rewards")  # what `offload` may name
STEPS = 16  # denoising steps where neither the config nor an embedded model says how many
CALL = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")


@dataclass
class VideoPolicyConfig(_BaseConfig):
    """Settings of every trainer of a video policy, on top of `transformers.TrainingArguments`."""

    without_effect: ClassVar[dict[str, str]] = {}  # {inherited field that is not read: what to do instead}

    # --- the policy: how a video is sampled ---
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps of a sample. Unset: an embedded model's own, otherwise 16."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance scale. Unset: the model's default."}
    )
    height: int | None = field(default=None, metadata={"help": "Pixels. Unset: the model's default."})
    width: int | None = field(default=None, metadata={"help": "Pixels. Unset: the model's default."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames. Unset: the model's default."})
    pipeline_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the pipeline's call as a dict or JSON, for instance "
            '{"max_sequence_length": 226, "negative_prompt": "blurry"}.'
        },
    )

    # --- how the denoiser is run, in sampling and update alike ---
    attention_kernel: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel that the denoiser prefers: cudnn (fastest on Hopper), flash, efficient or "
            "math. Unset: torch's choice."
        },
    )
    recompute: str = field(
        default="all_but_attention",
        metadata={
            "help": "With torch_compile and gradient_checkpointing: what backward computes again, "
            "'all_but_attention' or 'everything' (slower, and less memory)."
        },
    )

    base_precision: str | None = field(
        default=None,
        metadata={
            "help": "fp8: the frozen projections of attention and feed-forward are stored and multiplied in FP8 "
            "(e4m3), in sampling and update alike: half of their memory, and with torch_compile faster; NVIDIA "
            "GPUs since Ada and Hopper. Unset: the weights' own."
        },
    )

    # --- memory ---
    offload: list[str] | None = field(
        default=None,
        metadata={
            "help": "What lies in the host's memory while it is idle, among text_encoder, vae, rewards and "
            "denoiser (for pipelines of several, or where not even one fits beside the rest). Unset: nothing."
        },
    )

    # --- how the VAE decodes ---
    vae_dtype: str | None = field(
        default=None,
        metadata={"help": "float32 or bfloat16, of the VAE alone. Unset: that of the run (bfloat16 with bf16)."},
    )
    vae_slicing: bool = field(
        default=False, metadata={"help": "Whether the VAE decodes one video at a time, for memory; the videos stay."}
    )
    vae_tiling: bool = field(
        default=False,
        metadata={
            "help": "Whether the VAE decodes large frames in overlapping tiles, for memory; they change a little."
        },
    )

    vae_chunk_frames: int | None = field(
        default=None,
        metadata={
            "help": "Latent frames that Wan's VAE decodes at a time, for speed and more memory. Unset: one, as "
            "diffusers does."
        },
    )
    vae_compile: bool = field(
        default=False,
        metadata={"help": "With vae_chunk_frames, whether its decoder is compiled; the first videos wait for it."},
    )

    # --- data, rewards, weights ---
    image_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of images (pictures, paths or tensors) that a pipeline takes as the arguments of "
            "the same names, video by video. Unset: `image` where its call has such an argument."
        },
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the training prompts."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward. Unset: 1 each."}
    )
    reward_device: str | None = field(
        default=None,
        metadata={
            "help": "Where rewards and judges work, for instance cuda:1, another GPU of this host, so that they "
            "and the policy share no memory; of several processes devices with commas, which each host's "
            "processes take in turn. Unset: where each reward puts itself."
        },
    )
    reward_timeout: float = field(
        default=1200.0,
        metadata={
            "help": "Seconds that a reward may take for one batch; then the run ends with a message that names "
            "it and the rank. Below ddp_timeout, for which the other ranks wait. 0: no limit."
        },
    )
    lora_denoisers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Denoisers that get an adapter, or with peft_config='full' are trained, for instance "
            '["transformer_2"], the low-noise expert of Wan 2.2. One learns only from trained steps that '
            "call it. Unset: all."
        },
    )
    continue_from: str | None = field(
        default=None,
        metadata={
            "help": "A saved LoRA to train further: a folder that a trainer, diffusers or peft wrote, a file of "
            "diffusers' layout, or a Hub id. Its rank, alpha and modules stay. Unset: a new adapter."
        },
    )
    continue_reference: str = field(
        default="base",
        metadata={
            "help": "With continue_from, the reference policy, of the KL penalty and of auxiliary losses: "
            "'base' (the model without an adapter) or 'adapter' (with that saved one)."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average of the adapter, which is then what is evaluated and "
            "saved. Unset: none."
        },
    )

    # --- many processes ---
    context_parallel: int = field(
        default=1,
        metadata={
            "help": "Processes that share the tokens of each video, for long ones (diffusers' Ulysses "
            "attention); must divide the number of processes, and the denoiser's heads and tokens."
        },
    )
    equal_weights_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between checks that all processes hold the same adapter, to the bit. It is "
            "also checked before each checkpoint."
        },
    )

    # --- evaluation and what a run leaves ---
    eval_seed: int = field(default=42, metadata={"help": "Seed of the fixed evaluation noise."})
    num_sample_videos: int = field(
        default=8, metadata={"help": "Videos of each evaluation written to samples/ as mp4, sheet and TensorBoard."}
    )
    trace_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps whose time line every process writes to output_dir/trace_rank{r}.json, for "
            "chrome://tracing or Perfetto. 0: none."
        },
    )
    fps: int = field(default=8, metadata={"help": "Frames per second of the written videos."})

    # --- TrainingArguments with other defaults ---
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the adapter."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Columns reach the rewards: keep."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between logs."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Whether losses that are no number are left out of the log; every micro-batch then waits "
            "for the device."
        },
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where scalars and videos are logged: tensorboard, wandb or trackio."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Whether to evaluate before training (when there is an eval_dataset)."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # accelerate would compile the policy as a whole; here its blocks are compiled (policy/fast/execution.py)
        compiled = self.torch_compile, self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if self.report_to is None:  # transformers takes it for the name of an integration
            self.report_to = "none"
        with warnings.catch_warnings():  # its default comes from TRL, under the name every TRL user knows
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
            super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = compiled
        self.torch_compile = self.torch_compile or any(compiled[1:])
        check_inherited(self)
        check_processes(self)
        requested_sharding(self)  # before a pipeline is loaded, by the trainer or by its caller
        if self.recompute not in ("all_but_attention", "everything"):
            raise ValueError(f"recompute={self.recompute!r} must be 'all_but_attention' or 'everything'.")
        if self.base_precision not in (None, "fp8"):
            raise ValueError(f"base_precision={self.base_precision!r} must be 'fp8', or unset.")
        if self.base_precision == "fp8":
            check_device(self.device)
        self._read_pipeline_kwargs()
        check_call(self.policy_kwargs())
        if isinstance(self.offload, str) or set(self.offload or ()) - set(OFFLOAD):
            raise ValueError(f"offload={self.offload!r} must be a list of some of {list(OFFLOAD)}, or unset.")
        self.own_reward_device()  # an error now, not after the model is loaded
        if self.continue_reference not in ("base", "adapter"):
            raise ValueError(f"continue_reference={self.continue_reference!r} must be 'base' or 'adapter'.")
        if self.continue_reference == "adapter" and not self.continue_from:
            raise ValueError("continue_reference='adapter' needs continue_from, the saved adapter that is meant.")
        self._check_start_stays()
        if self.fp16:
            raise ValueError("fp16=True is not supported: losses of samples lose too many digits. Use bf16 or fp32.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, for instance 0.95.")
        if self.reward_timeout < 0 or (self.world_size > 1 and self.reward_timeout >= self.ddp_timeout):
            raise ValueError(
                f"reward_timeout={self.reward_timeout:g} must be 0 (no limit) or, on several processes, between 0 and "
                f"ddp_timeout={self.ddp_timeout}: the other ranks wait that long, and then name the rank, but not "
                "the reward. Lower it, or raise ddp_timeout."
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
        """Names of the settings that are the method's own; a run that is resumed with others says so."""
        return ()

    def uses_reference(self) -> bool:
        """Whether the algorithm's loss refers to a reference policy."""
        return False

    def held(self) -> Held:
        """What the method holds on a device, from which `estimate_memory` counts; of a config that is settled."""
        videos = self.per_device_train_batch_size
        return Held(sampled=videos, trained=videos, prompts=videos)

    def _check_start_stays(self) -> None:
        """A run replaces the adapter and sets aside the checkpoints in its output_dir: it cannot start from them."""
        start, output = Path(self.continue_from or ""), Path(self.output_dir).resolve()
        if not self.continue_from or not start.exists() or not start.resolve().is_relative_to(output):
            return
        inside, files = start.resolve().relative_to(output), listed(output)
        if files is None:
            moves = not inside.parts or inside.parts[0].startswith("checkpoint-")
            moves = moves or len(inside.parts) == 1 and start.is_file()
        else:  # saving moves any adapter that lies in the folder itself
            moves = str(inside) in (".", ADAPTERS[0]) or any(
                inside.is_relative_to(path) or Path(path).is_relative_to(inside) for path in files
            )
        if moves:
            raise ValueError(
                f"continue_from={self.continue_from!r} lies in output_dir={self.output_dir!r}, whose adapter and "
                "checkpoints this run replaces; choose another output_dir. To resume an interrupted run, set "
                "resume_from_checkpoint instead."
            )

    @property
    def data_parts(self) -> int:
        """Among how many the videos are divided: processes, or groups of them that share each video's tokens."""
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
        """Whether everything that counts denoising steps fits so many."""
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be at least 1.")

    def settle_call(self, defaults: dict) -> None:
        """Take what is unset of the pipeline's call from `defaults` (`assets.call_defaults`), steps in any case.

        Raises:
            ValueError: another setting does not fit that number of steps.
        """
        given = self.pipeline_kwargs or {}
        for name in CALL:
            if getattr(self, name) is None and name not in given:
                setattr(self, name, defaults.get(name))
        self.pipeline_kwargs = {n: v for n, v in defaults.items() if n not in CALL} | given
        self.num_inference_steps = self.num_inference_steps or STEPS
        self._check_steps(self.num_inference_steps)

    def videos_a_step(self) -> str:
        """How many videos are sampled how often, in words."""
        videos = self.per_device_train_batch_size * self.data_parts * self.gradient_accumulation_steps
        return f"each optimizer step samples {videos} videos"

    def own_reward_device(self) -> torch.device | None:
        """The one of `reward_device` that is this process's; a ValueError if one of them is none of this host's."""
        if self.reward_device is None:
            return None
        devices = []
        for name in self.reward_device.split(","):
            try:
                devices.append(torch.device(name.strip()))
                here = torch.get_device_module(devices[-1]).device_count()
            except RuntimeError as error:
                raise ValueError(f"reward_device={self.reward_device!r}: {name!r} is no device: {error}") from error
            if (devices[-1].index or 0) >= here:
                raise ValueError(f"reward_device={self.reward_device!r}: there is no {name} among {here} of its kind.")
        return devices[self.local_process_index % len(devices)]

    def policy_kwargs(self) -> dict:
        """The arguments of the pipeline's call that this config sets."""
        call = dict(self.pipeline_kwargs or {})
        for name in CALL[1:]:
            if getattr(self, name) is not None:
                call[name] = getattr(self, name)
        return call

    def policy_settings(self) -> dict:
        """The arguments of `VideoPolicy`."""
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
        }
