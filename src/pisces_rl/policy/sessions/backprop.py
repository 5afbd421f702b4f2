"""Sample with gradients from a given step to the decoded video, by the same call of the pipeline."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..schedule.scheduler import PolicyError
from .one_step import seeded_noise
from .pipeline_call import run_until_left, videos_of
from .session import LeavePipeline, Session, replaced_method, starts_without_followed

if TYPE_CHECKING:
    from ..video_policy import VideoPolicy


@dataclass(frozen=True)
class DecodedPart:
    """The latent frames to decode with a graph: `count` consecutive ones from a random start.

    A decoder of clips (latents (B, C, T, h, w)) decodes only these, as a shorter clip. A decoder of single frames
    (latents (B T, C, h, w)) decodes all frames, and only these carry gradients.

    Args:
        count: number of latent frames.
        seed: seed of the start.
    """

    count: int
    seed: int

    def of(self, frames: int) -> slice:
        count = min(self.count, frames)
        start = int(torch.randint(frames - count + 1, (1,), generator=torch.Generator().manual_seed(self.seed)))
        return slice(start, start + count)


class DifferentiableSampling(Session):
    """The pipeline's ODE with gradients from step `start` to the decoded video.

    Args:
        policy: the policy.
        prompts: one per video.
        start: the first step with gradients.
        jump: at `start`, jump to the prediction x0^ and skip the later steps.
        renoise: (clean latents, one seed per prompt): start step `start` from these latents with fresh noise, and skip
            the earlier steps.
        decode: False leaves the pipeline after the last step.

    Attributes:
        final: the latents after the last step.
    """

    def __init__(
        self,
        policy: "VideoPolicy",
        prompts: Sequence[str],
        start: int,
        jump: bool = False,
        renoise: tuple[Tensor, Sequence[int]] | None = None,
        decode: bool = True,
    ):
        super().__init__(policy, prompts)
        self.start, self.jump, self.renoise, self.decode = start, jump, renoise, decode
        self.final: Tensor | None = None

    @property
    def needs_prediction(self) -> bool:
        skipped = self.index < self.start and self.renoise is not None
        return not skipped and not (self.index > self.start and self.jump)

    @property
    def frames(self) -> int:
        """Number of latent frames of a video, if frames are decoded one by one."""
        return self.final.shape[2] if self.final.ndim == 5 else self.final.shape[0] // len(self.prompts)

    def begin(self, scheduler: SchedulerMixin) -> None:
        super().begin(scheduler)
        torch.set_grad_enabled(self.start == 0 and self.decode)

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.check_step()
        i = self.index
        if self.needs_prediction and i == self.start and self.jump:
            following = self.schedule.denoised(i, prediction, x).to(x.dtype)
        elif self.needs_prediction:
            following = self.moments(prediction, x, 0.0)[0].to(x.dtype)
        elif i + 1 == self.start:
            clean, seeds = self.renoise
            following = self.schedule.noised(self.start, clean, seeded_noise(clean, seeds)).to(x)
        else:
            following = x
        self.index += 1
        torch.set_grad_enabled(self.index >= self.start and self.decode)
        if self.index == self.schedule.num_steps:
            self.final = following
            if not self.decode:
                raise LeavePipeline
        return following

    def follow(self, number: int, index: int, x: Tensor, x_next: Tensor) -> Tensor:
        if self.renoise is not None:
            raise starts_without_followed(self)
        return x_next

    def check_finished(self) -> None:
        if self.final is None:
            raise PolicyError(
                f"{type(self.policy.pipeline).__name__} took {self.index} scheduler steps; a policy needs exactly one "
                "per timestep."
            )


@contextlib.contextmanager
def decoding(session: DifferentiableSampling, part: DecodedPart | None, checkpointed: bool) -> Iterator[None]:
    """Checkpoint the VAE's `decode` and restrict it to a part while the context is open."""
    pipeline = session.policy.pipeline
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        raise PolicyError(f"{type(pipeline).__name__} has no vae; reward backpropagation needs one to decode.")
    decode = vae.decode
    done = 0  # frames decoded so far, if they are decoded one by one

    def clip(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if checkpointed and z.requires_grad:
            with set_checkpoint_early_stop(False):  # EasyAnimate's decoder clears its frame cache at the very end
                return checkpoint(lambda z: decode(z, *args, return_dict=False, **kwargs)[0], z, use_reentrant=False)
        return decode(z, *args, return_dict=False, **kwargs)[0]

    def frames(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal done
        of_video = torch.arange(done, done + len(z)) % session.frames
        done += len(z)
        chosen = part.of(session.frames)
        rows = ((of_video >= chosen.start) & (of_video < chosen.stop)).to(z.device)
        with torch.no_grad():
            rest = decode(z[~rows], *args, return_dict=False, **kwargs)[0] if not rows.all() else None
        if not rows.any():
            return rest
        video = clip(z[rows], *args, **kwargs)
        if rest is None:
            return video
        return video.new_zeros(len(z), *video.shape[1:]).index_put((rows,), video).index_put((~rows,), rest)

    def entry(_: Any, z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        if part is not None and z.ndim == 5:
            z = z[:, :, part.of(z.shape[2])]
        video = (clip if part is None or z.ndim == 5 else frames)(z, *args, **kwargs)
        return DecoderOutput(sample=video) if return_dict else (video,)

    with replaced_method(vae, "decode", entry):
        yield


def decoded_videos(
    session: DifferentiableSampling, noise_seeds: Sequence[int], part: DecodedPart | None, checkpointed: bool
) -> Tensor:
    """Return one call's videos (B, F, 3, H, W), fp32 with gradients; a PolicyError if the pipeline cuts the graph."""
    name = type(session.policy.pipeline).__name__
    try:
        with decoding(session, part, checkpointed):
            output = run_until_left(session, noise_seeds, "pt")
    except RuntimeError as error:
        if "numpy() on Tensor that requires grad" not in str(error):
            raise
        raise PolicyError(
            f"{name} converts its videos to numpy before it returns them (Cosmos: for its guardrail), which "
            "cuts the graph, so rewards cannot be back-propagated. Use GRPO."
        ) from error
    if session.final is not None and not session.final.requires_grad:
        raise PolicyError(
            f"the denoising steps with gradients call only denoisers of {name} that are not trained. Train the "
            "denoiser that they call (lora_denoisers), or backpropagate through more steps (backprop_steps)."
        )
    videos = output[0]
    if not isinstance(videos, Tensor) or not videos.requires_grad:
        fix = (
            "Use GRPO."
            if part is None
            else (
                "Decode all frames (decode_frames unset), or more than "
                f"{part.count}: decoders of fixed-length clips return nothing for fewer (Allegro: 6); or use GRPO."
            )
        )
        raise PolicyError(
            f"{name} returned no video tensor with gradients (a {type(videos).__name__}): its decoding or "
            f"post-processing cuts the graph, so rewards cannot be back-propagated. {fix}"
        )
    return videos_of(session.policy, output, whole=part is None).float()
