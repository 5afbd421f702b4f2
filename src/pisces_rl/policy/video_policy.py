"""An unmodified diffusers pipeline as a stochastic policy, by teacher-forced replay.

Sampling runs the pipeline's own `__call__`; its scheduler passes every step to a transition kernel, which draws x' and
scores it. Replay runs the same `__call__` again from the same start noise, on any rows of the batch: at each trained
step the kernel scores the RECORDED x' under the new prediction and passes the log-probability to a visitor, which may
call backward at once, so that only one step's graph exists at a time. Guidance, expert boundaries, dynamic shifts and
dtypes are the pipeline's own in both passes, hence equal by construction. No code here is specific to a model.
"""

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed import DeviceMesh

from .fast.execution import ATTENTION_KERNELS, checkpointed, compile_blocks
from .fast.fp8 import FP8Linear, check_device, quantise, save_numbers, serves_fp8
from .fast.products import fuse_products
from .lora.adapters import PRODUCTS
from .pipeline.conditions import Conditions, calls, checked_conditions, of_video
from .pipeline.decoder import set_decoder
from .pipeline.inference_only import check_trainable
from .pipeline.latents import LatentCodec
from .pipeline.offload import device_of, kind_of, leave_idle, place, resident
from .pipeline.prompts import PromptMemo
from .pipeline.quirks import ONE_VIDEO_AT_A_TIME
from .pipeline.rules import checked_kwargs, checked_window, denoisers_of, scheduler_of
from .pipeline.text_lengths import takes_mask
from .rollout import Rollout
from .schedule.scheduler import PolicyError, find_transition, sampler_of
from .sessions.backprop import DecodedPart, DifferentiableSampling, decoded_videos
from .sessions.one_step import OneStep, Prediction
from .sessions.pipeline_call import run, run_until_left, videos_of
from .sessions.session import Comparison, Replay, ReplayStep, Sampling
from .sharded.sharding import largest_over_ranks, shard, share_tokens


class VideoPolicy(nn.Module):
    """A diffusers text-to-video pipeline as a policy: `sample` and `replay`.

    An image-to-video pipeline takes its images as `conditions`, {argument of its call: one value per video}; the
    pipeline is then called once per video. A text-to-image pipeline makes videos of one frame.

    Args:
        pipeline: any such `DiffusionPipeline` with one scheduler step per denoising step.
        transition: name in `TRANSITIONS`; None means `flow_sde` for flow matching, `ancestral` for EDM and `ddim`
            otherwise.
        noise_level: the kernel's noise (a or eta); None means the value of the kernel's authors.
        num_inference_steps: number N of denoising steps.
        sde_window_size: number of consecutive steps that are stochastic and trained; the others are ODE steps. None
            makes all steps but the last stochastic.
        sde_window_range: (low, high), the steps [low, high) in which a window may lie; None means all but the last.
        pipeline_kwargs: more arguments of the pipeline's call, e.g. height, width, num_frames, guidance_scale.
        autocast_dtype: dtype of torch.autocast around the denoiser, in both passes; None is off.
        attention_kernel: name in `ATTENTION_KERNELS`, preferred by the denoiser in both passes; None: torch's choice.
        vae_dtype: dtype of the VAE, see `decoder.set_decoder`.
        vae_slicing: decode one video at a time.
        vae_tiling: decode each frame in tiles.
        vae_chunk_frames: number of latent frames that Wan's decoder takes per call.
        vae_compile: compile that decoder.
        vae_cudnn_benchmark: let cuDNN time the kernels of that decoder and take the fastest.

    Raises:
        PolicyError: the pipeline breaks a rule for policies, or a setting does not fit it.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        transition: str | None = None,
        noise_level: float | None = None,
        num_inference_steps: int = 16,
        sde_window_size: int | None = None,
        sde_window_range: tuple[int, int] | None = None,
        pipeline_kwargs: dict | None = None,
        autocast_dtype: torch.dtype | None = None,
        attention_kernel: str | None = None,
        vae_dtype: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        vae_chunk_frames: int | None = None,
        vae_compile: bool = False,
        vae_cudnn_benchmark: bool = False,
    ):
        super().__init__()
        self.pipeline = pipeline
        denoisers = denoisers_of(pipeline)
        check_trainable(pipeline, denoisers)
        self.denoiser = nn.ModuleDict(denoisers)
        self.scheduler = scheduler_of(pipeline)
        self.transition = find_transition(transition, self.scheduler)
        self.noise_level = self.transition.noise_level if noise_level is None else noise_level
        self.num_inference_steps = num_inference_steps
        self.sde_window_size = sde_window_size
        self.sde_window_range = checked_window(sde_window_size, sde_window_range, num_inference_steps)
        self.pipeline_kwargs = checked_kwargs(pipeline, dict(pipeline_kwargs or {}))
        self.autocast_dtype = autocast_dtype
        if attention_kernel not in (None, *ATTENTION_KERNELS):
            raise PolicyError(f"attention_kernel={attention_kernel!r} must be one of {list(ATTENTION_KERNELS)}.")
        self.attention_kernel = attention_kernel
        self.compiled = False
        self.mesh: DeviceMesh | None = None  # of the ranks that share the denoisers' weights
        self._comparisons: list[Comparison] = []  # of replays whose states are not checked yet
        self.shares_tokens = False  # with other ranks, which sample the same videos
        unmasked = not any(takes_mask(module) for module in self.denoiser.values())
        encoders = [c for name, c in pipeline.components.items() if kind_of(name) == "text_encoder"]
        self.prompt_memo = PromptMemo(pipeline.encode_prompt, pad=unmasked, during=lambda: resident(encoders))
        self.skipped_outputs: dict[tuple, tuple] = {}  # denoiser, call, rows per video -> output on meta, its videos
        self._codec: LatentCodec | None = None
        self.record: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.vae_dtype = vae_dtype
        set_decoder(
            pipeline,
            dtype=vae_dtype,
            slicing=vae_slicing,
            tiling=vae_tiling,
            chunk_frames=vae_chunk_frames,
            compiled=vae_compile,
            cudnn_benchmark=vae_cudnn_benchmark,
        )
        self.makes_images = False  # videos of one frame; known from the first sample on
        if type(getattr(pipeline, "vae", None)).__name__ in ONE_VIDEO_AT_A_TIME:
            pipeline.vae.enable_slicing()
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device that the denoisers run on."""
        if self.mesh is not None:
            return torch.device(self.mesh.device_type)
        return device_of(next(iter(self.denoiser.values())))

    @property
    def sampler(self) -> str:
        """A description of the sampler that draws the videos: its order, steps and grid."""
        return sampler_of(self.scheduler, self.num_inference_steps)

    def place(self, device: torch.device | str, offload: Sequence[str] = ()) -> None:
        """Move the pipeline to a device; components of the kinds in `offload` stay in host memory except while they
        are used, see `offload.place`. Call this after adding adapters."""
        place(self.pipeline, device, offload)

    def train(self, mode: bool = True) -> "VideoPolicy":
        """Stay in eval mode: dropout would make the replay differ from the sampling pass."""
        return super().train(False)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Checkpoint activations in every denoiser, as diffusers does; transformers' Trainer calls this by name.

        A denoiser class without support for it (UNet3DConditionModel) only warns.
        """
        as_it_is: tuple = None, {}, {"use_reentrant": False}
        if activation_checkpointing_kwargs not in as_it_is or every_n_layers != 1 or offload:
            raise ValueError(
                f"activation checkpointing of denoisers takes no options: got {activation_checkpointing_kwargs}, "
                f"every_n_layers={every_n_layers}, offload={offload}; leave gradient_checkpointing_kwargs unset."
            )
        if self.compiled:
            return  # the compiled blocks recompute what `compile_blocks` was told to
        for name, module in self.denoiser.items():
            if module._supports_gradient_checkpointing:
                module.enable_gradient_checkpointing(checkpointed(lambda: self.attention_kernel))
            else:
                warnings.warn(
                    f"{name} ({type(module).__name__}) does not support gradient checkpointing; the update "
                    "keeps all activations of one denoising step.",
                    stacklevel=2,
                )

    def set_base_precision(self, precision: str | None) -> None:
        """With "fp8", store the frozen attention and feed-forward projections in FP8, see `fast/fp8.py`.

        Call this before `compile_blocks`, `shard` and `place`. Sampling, replay and a reference without the adapter
        then all use these weights. To undo it, or to fuse an adapter, reload the pipeline.

        Raises:
            ValueError: precision is neither None nor "fp8", or the denoisers' device computes no FP8 products.
            PolicyError: there are no such projections, or none of a width that FP8 supports; blocks are already
                compiled or sharded; an adapter reads its base's weights (DoRA).
        """
        if precision not in (None, "fp8"):
            raise ValueError(f"base_precision={precision!r} must be 'fp8', or unset.")
        if precision is None:
            return
        if self.compiled or self.mesh is not None:
            raise PolicyError("base_precision='fp8': set it before compiling blocks and sharding weights.")
        count = 0
        for module in self.denoiser.values():
            check_device(device_of(module))
            layers = [m for n, m in module.named_modules() if re.fullmatch(PRODUCTS, n.removesuffix(".base_layer"))]
            if any(getattr(layer, "lora_variant", None) for layer in layers):
                raise PolicyError("base_precision='fp8': DoRA reads the base weights; use a plain LoRA or unset it.")
            for layer in filter(serves_fp8, layers):
                quantise(layer)
            save_numbers(module)
            count += sum(isinstance(layer, FP8Linear) for layer in layers)
        if not count:
            raise PolicyError(
                "base_precision='fp8': the denoisers have no frozen linear attention or feed-forward projections "
                "whose widths are multiples of 16; unset it."
            )

    def compile_blocks(
        self, recompute: str = "all_but_attention", backend: str | None = "inductor", mode: str | None = None
    ) -> None:
        """Compile the denoisers' repeated blocks, see `execution.compile_blocks`, and fuse their products.

        Call this after adding adapters and before running the denoisers. Sampling and update then run the same graphs.
        """
        for module in self.denoiser.values():
            fuse_products(module)
            compile_blocks(module, recompute=recompute, backend=backend, mode=mode)
        self.compiled = True

    def shard(self, mesh: DeviceMesh, *, reshard_after_forward: bool = True, cpu_offload: bool = False) -> None:
        """Shard the denoisers' weights, except adapters, over ranks, see `sharding.shard`. Add adapters first.

        From then on all ranks must make the same calls to this policy at the same time, with equal numbers of videos.
        """
        for module in self.denoiser.values():
            shard(module, mesh, reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload)
        self.mesh = mesh

    def share_tokens(self, mesh: DeviceMesh) -> None:
        """Split each video's tokens over ranks, see `sharding.share_tokens`; these ranks must make the same calls."""
        if self.compiled:
            raise PolicyError(
                "context_parallel: blocks with split tokens cannot be compiled; leave it at 1, or torch_compile off."
            )
        for module in self.denoiser.values():
            share_tokens(module, mesh)
        self.shares_tokens = True

    def agreed(self, number: int) -> int:
        """Return the largest `number` of the ranks that share weights, so that all call denoisers equally often."""
        return number if self.mesh is None else largest_over_ranks(number, self.mesh)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Call `activation_checkpointing_enable`; transformers before 5.18 uses this name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def record_with(self, record: Callable[[str], contextlib.AbstractContextManager]) -> None:
        """Enter record("text") while the pipeline encodes prompts and record("decode") while its VAE decodes."""
        self.record = self.prompt_memo.record = record

    def draw_window(self, seed: int) -> list[int]:
        """Return the trained steps of one rollout; a window smaller than its range gets a random position."""
        low, high = self.sde_window_range
        if low == high:
            raise PolicyError("num_inference_steps=1: GRPO needs at least 2 steps, since the last is deterministic.")
        if self.sde_window_size is None:
            return list(range(low, high))
        starts = high - low - self.sde_window_size + 1
        start = low + int(torch.randint(starts, (1,), generator=torch.Generator().manual_seed(seed)))
        return list(range(start, start + self.sde_window_size))

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.inference_mode(
        False
    )  # a caller's inference mode would leave tensors, also in the memo, that backward cannot use
    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        noise_seeds: Sequence[int],
        step_seeds: Sequence[int] | None = None,
        steps: Sequence[int] = (),
        output_type: str = "pt",
        conditions: Conditions | None = None,
    ) -> Rollout:
        """Sample one video per prompt.

        All randomness of a video comes from its own two seeds, so neither its batch-mates nor the number of processes
        change it.

        Args:
            prompts: B prompts.
            noise_seeds: B seeds of the start noise; equal seeds start from equal noise.
            step_seeds: B seeds of the transitions' noise; required with `steps`.
            steps: the stochastic steps to record; empty for deterministic sampling.
            output_type: "pt" for videos, "latent" to skip decoding.
            conditions: {argument of the pipeline's call: B values}, e.g. {"image": B images}.
        """
        if steps and step_seeds is None:
            raise ValueError("step_seeds must be given if steps are stochastic: one integer per prompt.")
        conditions = self._checked_conditions(conditions, len(prompts))
        parts = []
        for rows in calls(len(prompts), conditions):
            seeds = None if step_seeds is None else [step_seeds[r] for r in rows]
            session = Sampling(self, [prompts[r] for r in rows], seeds, steps)
            session.conditions = of_video(conditions, rows)
            noise = [noise_seeds[r] for r in rows]
            output = run(session, noise, output_type)
            session.check_finished()
            parts.append(session.rollout(videos_of(self, output).float() if output_type == "pt" else None, noise))
        leave_idle(self.pipeline)  # rewards come next
        return Rollout.cat(parts)

    def replay(
        self,
        rollout: Rollout,
        rows: Sequence[int],
        visitor: Callable[[ReplayStep], None],
        grad: bool = True,
        wait: bool = True,
    ) -> None:
        """Score the recorded transitions of the videos `rows` under the current weights.

        Args:
            rollout: what `sample` returned.
            rows: indices of videos in the rollout.
            visitor: called once per trained step, in order; it may call backward. If videos are conditioned, it is
                called once per video and trained step; `ReplayStep.rows` names the video.
            grad: build graphs at the trained steps.
            wait: wait for the device and check that the replay reached the recorded states; False leaves the check to
                `check_replays`, so that the next replay can start while the device still runs this one.
        """
        rows = list(rows)
        for part in calls(len(rows), rollout.conditions):
            part = [rows[i] for i in part]
            session = Replay(self, rollout, part, visitor, grad)
            session.conditions = of_video(rollout.conditions, part)
            run_until_left(session, [rollout.noise_seeds[r] for r in part], "latent")
            self._comparisons.append(session.comparison)
        if wait:
            self.check_replays()

    def check_replays(self) -> None:
        """Check pending replays, those with `wait=False`.

        Raises:
            PolicyError: a replay reached states that differ from the recorded ones.
        """
        comparisons, self._comparisons = self._comparisons, []
        for comparison in comparisons:
            comparison.check()

    # --- gradients through the sampler -------------------------------------------------------------------------------

    def final_latents(
        self, prompts: Sequence[str], *, noise_seeds: Sequence[int], conditions: Conditions | None = None
    ) -> Tensor:
        """Return deterministic samples' latents before decoding, in the scheduler's layout, without gradients."""

        def one_call(session: DifferentiableSampling, seeds: list[int]) -> Tensor | None:
            run_until_left(session, seeds, "latent")
            return session.final

        def session_of(rows: list[int]) -> DifferentiableSampling:
            return DifferentiableSampling(self, [prompts[r] for r in rows], start=0, decode=False)

        return torch.cat(self._each_call(session_of, one_call, noise_seeds, conditions))

    def sample_with_gradients(
        self,
        prompts: Sequence[str],
        *,
        noise_seeds: Sequence[int],
        last_steps: int = 1,
        jump_at: int | None = None,
        renoise: tuple[Tensor, Sequence[int]] | None = None,
        part: DecodedPart | None = None,
        checkpoint_decoder: bool = True,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Sample deterministically, with gradients through the last steps and the decoder to the denoiser's weights.

        The state that enters the first of these steps is a constant. The videos equal those of `sample` without steps.

        Args:
            prompts: B prompts.
            noise_seeds: B seeds of the start noise.
            last_steps: number of last denoising steps that carry gradients.
            jump_at: instead of the last steps, only this step carries gradients; its prediction x0^ of the clean
                latents is decoded, and later steps are skipped.
            renoise: (latents of `final_latents`, B seeds): start the last step from these latents with fresh noise at
                its level, for low-variance gradients (DRaFT-LV, arXiv 2309.17400); needs last_steps=1.
            part: decode only a part of the latent frames; None decodes all.
            checkpoint_decoder: recompute the decoder's activations in backward instead of keeping them.
            conditions: as in `sample`.

        Returns:
            (B, F, 3, H, W) fp32 in [0, 1] with gradients; with `part`, F is smaller if the decoder takes whole clips.
        """
        steps = self.num_inference_steps
        if not 1 <= last_steps <= steps:
            raise ValueError(f"last_steps={last_steps} must lie between 1 and num_inference_steps={steps}.")
        if jump_at is not None and not 0 <= jump_at < steps:
            raise ValueError(f"jump_at={jump_at} must be from 0 to {steps - 1} (num_inference_steps - 1).")
        if renoise is not None and (jump_at is not None or last_steps != 1):
            raise ValueError("renoise restarts the last step; it needs last_steps=1 and jump_at=None.")
        start = steps - last_steps if jump_at is None else jump_at

        def one_call(session: DifferentiableSampling, seeds: list[int]) -> Tensor:
            return decoded_videos(session, seeds, part, checkpoint_decoder)

        def session_of(rows: list[int]) -> DifferentiableSampling:
            clean = None if renoise is None else (_of(renoise[0], rows, len(prompts)), [renoise[1][r] for r in rows])
            return DifferentiableSampling(self, [prompts[r] for r in rows], start, jump_at is not None, clean)

        return torch.cat(self._each_call(session_of, one_call, noise_seeds, conditions))

    def latent_codec(self, conditions: Conditions | None = None) -> LatentCodec:
        """Return the codec between videos and latents at the pipeline's size; computed once, see `LatentCodec.of`."""
        if self._codec is None:
            self._codec = LatentCodec.of(self, conditions=conditions)
        return self._codec

    def predict(
        self,
        rollout: Rollout,
        rows: Sequence[int],
        *,
        noise_seeds: Sequence[int],
        step: int,
        state: Tensor | None = None,
        grad: bool = False,
        **overrides: Any,
    ) -> Prediction:
        """Return the model's prediction from noised videos at one step of the schedule.

        The videos' clean latents get fresh noise at the step's level. Step 0 uses the pipeline's own start noise
        instead.

        Args:
            rollout: what `sample` returned, or given videos: prompts, `clean`, and conditions if they have any.
            rows: indices of B videos in the rollout.
            noise_seeds: B seeds of the noise.
            step: index of the step.
            state: latents of the B videos that enter the step, instead of noised ones.
            grad: build a graph.
            overrides: arguments of the pipeline's call, for this call only, e.g. guidance_scale, num_inference_steps.
        """
        rows = list(rows)
        given = rollout.clean_rows(rows) if state is None and step else state

        def one_call(session: OneStep, seeds: list[int]) -> Prediction | None:
            run_until_left(session, seeds, "latent")
            return session.found

        def session_of(part: list[int]) -> OneStep:
            own = given if given is None else _of(given, part, len(rows))
            seeds = None if state is not None else [noise_seeds[r] for r in part]
            return OneStep(self, [rollout.prompts[rows[r]] for r in part], step, own, seeds, grad, overrides)

        conditions = self._checked_conditions(rollout.conditions, len(rollout))
        conditions = {name: [values[r] for r in rows] for name, values in conditions.items()}
        return Prediction.cat(self._each_call(session_of, one_call, noise_seeds, conditions))

    def given_frames(self, conditions: Conditions | None) -> int:
        """Return how many latent frames at a video's start come from a condition, so that the model's prediction for
        them is discarded (Wan 2.2 TI2V with an image: one)."""
        image = any(name.endswith("image") for name in conditions or {})
        return int(image and bool(getattr(self.pipeline.config, "expand_timesteps", False)))

    # --- calls of the pipeline ---------------------------------------------------------------------------------------

    def _checked_conditions(self, conditions: Conditions | None, count: int) -> dict[str, list]:
        known = inspect.signature(inspect.unwrap(type(self.pipeline).__call__)).parameters
        return checked_conditions(self.pipeline, list(known), conditions, count, self.pipeline_kwargs)

    def _each_call(
        self, session_of: Callable, one_call: Callable, noise_seeds: Sequence[int], conditions: Conditions | None
    ) -> list:
        """Return `one_call(session_of(rows), seeds)` for the videos `rows` of each call of the pipeline."""
        conditions = self._checked_conditions(conditions, len(noise_seeds))
        results = []
        for rows in calls(len(noise_seeds), conditions):
            session = session_of(rows)
            session.conditions = of_video(conditions, rows)
            results.append(one_call(session, [noise_seeds[r] for r in rows]))
        return results


def _of(latents: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Return the latents of the videos `rows`, given those of `count` videos."""
    return latents.unflatten(0, (count, -1))[list(rows)].flatten(0, 1)
