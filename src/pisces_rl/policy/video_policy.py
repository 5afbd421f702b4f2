"""An unmodified diffusers pipeline as a stochastic policy, by teacher-forced replay.

Sampling runs the pipeline's own `__call__`; its scheduler hands every step to a transition kernel, which draws x' and
scores it. Replay runs the same `__call__` again from the same start noise, on any rows of the batch: at each trained
step the kernel scores the RECORDED x' under the new prediction and hands the log-probability to a visitor, which may
call backward at once, so that one step's graph lives at a time. Guidance, expert boundaries, dynamic shifts and dtypes
are the pipeline's own in both passes, hence equal by construction. No code here knows a model.
"""

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence

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
    """A text-to-video pipeline of diffusers as a policy: `sample` and `replay`.

    An image-to-video pipeline takes its images as `conditions`, {argument of its call: a value for each video}; the
    pipeline is then called once a video. A text-to-image pipeline makes videos of one frame.

    Args:
        pipeline: any such `DiffusionPipeline` with one scheduler step per denoising step.
        transition: name in `TRANSITIONS`; None takes `flow_sde` for flow matching, `ancestral` for EDM and `ddim`
            otherwise.
        noise_level: the kernel's noise (a or eta); None takes the value of the kernel's authors.
        num_inference_steps: denoising steps N.
        sde_window_size: how many consecutive steps are stochastic and trained; the others are ODE steps. None
            makes all steps but the last stochastic.
        sde_window_range: (low, high), the steps [low, high) in which a window may lie; None is all but the last.
        pipeline_kwargs: further arguments of the pipeline's call, e.g. height, width, num_frames, guidance_scale.
        autocast_dtype: dtype of torch.autocast around the denoiser, in both passes; None is off.
        attention_kernel: name in `ATTENTION_KERNELS`, preferred by the denoiser in both passes; None: torch's choice.
        vae_dtype: of the VAE while it decodes, see `decoder.set_decoder`.
        vae_slicing: decode one video at a time.
        vae_tiling: decode parts of a frame at a time.
        vae_chunk_frames: latent frames that Wan's decoder takes a call.
        vae_compile: compile that decoder.

    Raises:
        PolicyError: the pipeline breaks a rule a policy must keep, or a setting does not fit it.
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
        self._comparisons: list[Comparison] = []  # of replays whose states nobody has looked at yet
        self.shares_tokens = False  # with other ranks, which sample the same videos
        unmasked = not any(takes_mask(module) for module in self.denoiser.values())
        encoders = [c for name, c in pipeline.components.items() if kind_of(name) == "text_encoder"]
        self.prompt_memo = PromptMemo(pipeline.encode_prompt, pad=unmasked, during=lambda: resident(encoders))
        self.skipped_outputs: dict[tuple, tuple] = {}  # denoiser, call, rows a video -> output on meta, its videos
        self._codec: LatentCodec | None = None
        self.record = contextlib.nullcontext
        self.vae_dtype = vae_dtype
        set_decoder(
            pipeline,
            dtype=vae_dtype,
            slicing=vae_slicing,
            tiling=vae_tiling,
            chunk_frames=vae_chunk_frames,
            compiled=vae_compile,
        )
        self.makes_images = False  # videos of one frame; known from the first sample on
        if type(getattr(pipeline, "vae", None)).__name__ in ONE_VIDEO_AT_A_TIME:
            pipeline.vae.enable_slicing()
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the denoisers run."""
        if self.mesh is not None:
            return torch.device(self.mesh.device_type)
        return device_of(next(iter(self.denoiser.values())))

    @property
    def sampler(self) -> str:
        """Which sampler draws the videos, in words: its order, steps and grid."""
        return sampler_of(self.scheduler, self.num_inference_steps)

    def place(self, device: torch.device | str, offload: Sequence[str] = ()) -> None:
        """Move the pipeline to a device; the kinds of components in `offload` are there only while they are used, and
        in the host's memory otherwise, see `offload.place`. After adapters were added."""
        place(self.pipeline, device, offload)

    def train(self, mode: bool = True):
        """Stays in eval mode: dropout would make the replay differ from the sampling pass."""
        return super().train(False)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Checkpoint activations in every denoiser, as diffusers does it; transformers' Trainer calls this by name.

        A class that cannot (UNet3DConditionModel) warns and goes on.
        """
        as_it_is = None, {}, {"use_reentrant": False}
        if activation_checkpointing_kwargs not in as_it_is or every_n_layers != 1 or offload:
            raise ValueError(
                f"activation checkpointing of denoisers takes no options: got {activation_checkpointing_kwargs}, "
                f"every_n_layers={every_n_layers}, offload={offload}; leave gradient_checkpointing_kwargs unset."
            )
        if self.compiled:
            return  # the blocks compute again what `compile_blocks` was told
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
        """With "fp8", store the frozen projections of attention and feed-forward in FP8, see `fast/fp8.py`.

        Before `compile_blocks`, `shard` and `place`. Sampling, replay and a reference without the adapter then all
        compute with them. Reload the pipeline to undo it, and to fuse an adapter.

        Raises:
            ValueError: another precision than None or "fp8", or the denoisers' device computes no FP8 products.
            PolicyError: there are no such projections, or none of widths that FP8 takes; blocks are compiled or
                sharded already; an adapter reads its base's weights (DoRA).
        """
        if precision not in (None, "fp8"):
            raise ValueError(f"base_precision={precision!r} must be 'fp8', or unset.")
        if precision is None:
            return
        if self.compiled or self.mesh is not None:
            raise PolicyError("base_precision='fp8': set it before blocks are compiled and weights are sharded.")
        count = 0
        for module in self.denoiser.values():
            check_device(device_of(module))
            layers = [m for n, m in module.named_modules() if re.fullmatch(PRODUCTS, n.removesuffix(".base_layer"))]
            if any(getattr(layer, "lora_variant", None) for layer in layers):
                raise PolicyError("base_precision='fp8': DoRA reads the base's weights; use a plain LoRA or unset it.")
            for layer in filter(serves_fp8, layers):
                quantise(layer)
            save_numbers(module)
            count += sum(isinstance(layer, FP8Linear) for layer in layers)
        if not count:
            raise PolicyError(
                "base_precision='fp8': the denoisers have no frozen linear projections of attention or "
                "feed-forward whose widths are multiples of 16; unset it."
            )

    def compile_blocks(
        self, recompute: str = "all_but_attention", backend: str | None = "inductor", mode: str | None = None
    ) -> None:
        """Compile the denoisers' repeated blocks, see `execution.compile_blocks`, and fuse their products.

        Before anything else runs them, and after adapters were added. Sampling and update then run the same graphs.
        """
        for module in self.denoiser.values():
            fuse_products(module)
            compile_blocks(module, recompute=recompute, backend=backend, mode=mode)
        self.compiled = True

    def shard(self, mesh: DeviceMesh, *, reshard_after_forward: bool = True, cpu_offload: bool = False) -> None:
        """Share the denoisers' weights among ranks, all but adapters, see `sharding.shard`; after adapters were added.

        From then on all ranks must make the same calls of this policy at the same time, with as many videos each.
        """
        for module in self.denoiser.values():
            shard(module, mesh, reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload)
        self.mesh = mesh

    def share_tokens(self, mesh: DeviceMesh) -> None:
        """Split each video's tokens over ranks, see `sharding.share_tokens`; these must make the same calls."""
        if self.compiled:
            raise PolicyError(
                "context_parallel: blocks whose tokens are split cannot be compiled; leave it 1, or torch_compile off."
            )
        for module in self.denoiser.values():
            share_tokens(module, mesh)
        self.shares_tokens = True

    def agreed(self, number: int) -> int:
        """A number of denoiser calls that is the same on all ranks where they must make the same."""
        return number if self.mesh is None else largest_over_ranks(number, self.mesh)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """The same by its older name, which transformers before 5.18 call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def record_with(self, record: Callable[[str], contextlib.AbstractContextManager]) -> None:
        """Enter record("text") where the pipeline encodes prompts, record("decode") where its VAE decodes."""
        self.record = self.prompt_memo.record = record

    def draw_window(self, seed: int) -> list[int]:
        """The trained steps of one rollout; a random position where a window is smaller than its range."""
        low, high = self.sde_window_range
        if low == high:
            raise PolicyError("num_inference_steps=1: GRPO needs at least 2 steps, the last is deterministic.")
        if self.sde_window_size is None:
            return list(range(low, high))
        starts = high - low - self.sde_window_size + 1
        start = low + int(torch.randint(starts, (1,), generator=torch.Generator().manual_seed(seed)))
        return list(range(start, start + self.sde_window_size))

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # a caller's would leave tensors, in the memo too, that backward cannot use
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
        """Sample one video a prompt.

        All randomness of a video comes from its own two seeds, so that neither its batch-mates nor the number of
        processes change it.

        Args:
            prompts: B prompts.
            noise_seeds: B seeds of the start noise; equal seeds start from equal noise.
            step_seeds: B seeds of the transitions' noise; needed with `steps`.
            steps: the stochastic steps to record; empty for deterministic sampling.
            output_type: "pt" for videos, "latent" to skip decoding.
            conditions: {argument of the pipeline's call: B values}, e.g. {"image": B images}.
        """
        if steps and step_seeds is None:
            raise ValueError("step_seeds must be given when steps are stochastic: one integer a prompt.")
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
            visitor: called once per trained step, in order; it may call backward. Where videos are conditioned, once
                per video and trained step: `ReplayStep.rows` says of which.
            grad: build graphs at the trained steps.
            wait: for the device, to see that the replay reached the recorded states; False leaves that to
                `check_replays`, and the next replay begins while the device is busy with this one.
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
        """Of the replays that nobody waited for.

        Raises:
            PolicyError: one of them reached other states than the recorded ones.
        """
        comparisons, self._comparisons = self._comparisons, []
        for comparison in comparisons:
            comparison.check()

    # --- gradients through the sampler -------------------------------------------------------------------------------

    def final_latents(
        self, prompts: Sequence[str], *, noise_seeds: Sequence[int], conditions: Conditions | None = None
    ) -> Tensor:
        """The latents of deterministic samples before decoding, in the scheduler's layout, without gradients."""

        def one_call(session: DifferentiableSampling, seeds: list[int]) -> Tensor:
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
        """Deterministic samples whose gradient reaches the denoiser's weights through the last steps and the decoder.

        The state that enters the first of these steps is a constant. The videos are those of `sample` without steps.

        Args:
            prompts: B prompts.
            noise_seeds: B seeds of the start noise.
            last_steps: how many of the last denoising steps carry gradients.
            jump_at: in place of `last_steps`, this one step carries gradients, and its prediction x0^ of the clean
                latents is what is decoded; later steps are skipped.
            renoise: (latents of `final_latents`, B seeds): the last step starts from them with fresh noise at its own
                level, for low-variance gradients (DRaFT-LV, arXiv 2309.17400); needs last_steps=1.
            part: decode a part of the latent frames only; None: all.
            checkpoint_decoder: compute the decoder's activations again in backward instead of keeping them.
            conditions: as in `sample`.

        Returns:
            (B, F, 3, H, W) fp32 in [0, 1] with gradients; F is shorter with `part` where clips are decoded whole.
        """
        steps = self.num_inference_steps
        if not 1 <= last_steps <= steps:
            raise ValueError(f"last_steps={last_steps} must lie between 1 and num_inference_steps={steps}.")
        if jump_at is not None and not 0 <= jump_at < steps:
            raise ValueError(f"jump_at={jump_at} is not a step of num_inference_steps={steps}.")
        if renoise is not None and (jump_at is not None or last_steps != 1):
            raise ValueError("renoise starts the last step anew; it needs last_steps=1 and jump_at=None.")
        start = steps - last_steps if jump_at is None else jump_at

        def one_call(session: DifferentiableSampling, seeds: list[int]) -> Tensor:
            return decoded_videos(session, seeds, part, checkpoint_decoder)

        def session_of(rows: list[int]) -> DifferentiableSampling:
            clean = None if renoise is None else (_of(renoise[0], rows, len(prompts)), [renoise[1][r] for r in rows])
            return DifferentiableSampling(self, [prompts[r] for r in rows], start, jump_at is not None, clean)

        return torch.cat(self._each_call(session_of, one_call, noise_seeds, conditions))

    def latent_codec(self, conditions: Conditions | None = None) -> LatentCodec:
        """Between videos and the latents of this pipeline at its present size; found once, see `LatentCodec.of`."""
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
        **overrides,
    ) -> Prediction:
        """What the model makes of noised videos at one step of the schedule.

        The videos' clean latents are brought to the step's noise level with fresh noise. At step 0 they give way to
        the pipeline's own start noise.

        Args:
            rollout: what `sample` returned, or given videos: prompts, `clean`, and conditions where they have some.
            rows: indices of B videos in the rollout.
            noise_seeds: B seeds of the noise.
            step: its index.
            state: latents of the B videos that enter the step, in place of noised ones.
            grad: build a graph.
            overrides: arguments of the pipeline's call for this once, e.g. guidance_scale, num_inference_steps.
        """
        rows = list(rows)
        given = rollout.clean_rows(rows) if state is None and step else state

        def one_call(session: OneStep, seeds: list[int]) -> Prediction:
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
        """How many latent frames at a video's beginning are a condition's, which the model is given and whatever it
        predicts there is thrown away (Wan 2.2 TI2V with an image: one)."""
        image = any(name.endswith("image") for name in conditions or {})
        return int(image and bool(getattr(self.pipeline.config, "expand_timesteps", False)))

    # --- calls of the pipeline ---------------------------------------------------------------------------------------

    def _checked_conditions(self, conditions: Conditions | None, count: int) -> dict[str, list]:
        known = inspect.signature(inspect.unwrap(type(self.pipeline).__call__)).parameters
        return checked_conditions(self.pipeline, list(known), conditions, count, self.pipeline_kwargs)

    def _each_call(
        self, session_of: Callable, one_call: Callable, noise_seeds: Sequence[int], conditions: Conditions | None
    ) -> list:
        """What `one_call(session, seeds)` returns for the videos of each call, with `session_of(rows)`."""
        conditions = self._checked_conditions(conditions, len(noise_seeds))
        results = []
        for rows in calls(len(noise_seeds), conditions):
            session = session_of(rows)
            session.conditions = of_video(conditions, rows)
            results.append(one_call(session, [noise_seeds[r] for r in rows]))
        return results


def _of(latents: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """The latents of the videos `rows` among those of `count` videos."""
    return latents.unflatten(0, (count, -1))[list(rows)].flatten(0, 1)
