"""Call the pipeline under a session, with the policy's scheduler, prompt memo and denoiser entry."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..fast.execution import attention_kernel
from ..pipeline.decoder import recorded_decoding
from ..pipeline.guider import guided
from ..pipeline.rules import check_video
from ..pipeline.text_lengths import by_length
from ..schedule.scheduler import PolicyError, stochastic
from ..sharded.sharding import tokens_divide
from .session import LeavePipeline, Session


def run(session: Session, noise_seeds: Sequence[int], output_type: str):
    """Return the pipeline's output for a session's prompts, with start noise from one seed per prompt."""
    policy = session.policy
    pipeline, prompts = policy.pipeline, session.prompts
    generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
    call = inspect.unwrap(type(pipeline).__call__)  # without the no_grad decorator
    arguments = {
        "num_inference_steps": policy.num_inference_steps,
        **policy.pipeline_kwargs,
        **session.conditions,
        **session.overrides,
    }
    if isinstance(arguments.get("negative_prompt"), str):  # not every pipeline repeats a single one
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    decoding = recorded_decoding(pipeline, policy.record, policy.vae_dtype)
    with _swapped(session), decoding, guided(pipeline, arguments) as arguments:
        return call(pipeline, prompt=prompts, generator=generators, output_type=output_type, **arguments)


def run_until_left(session: Session, noise_seeds: Sequence[int], output_type: str):
    """Run the pipeline without gradients, except where the session enables them; None if it leaves early."""
    grad_mode = torch.is_grad_enabled()
    output = None
    try:
        with torch.no_grad():
            output = run(session, noise_seeds, output_type)
    except LeavePipeline:
        pass
    finally:
        torch.set_grad_enabled(grad_mode)
    session.check_finished()
    return output


def videos_of(policy, output, whole: bool = True) -> Tensor:
    """Return the videos (B, F, 3, H, W) of a pipeline's output; an image is a video of one frame.

    Args:
        policy: the policy.
        output: what the pipeline returned.
        whole: whether all frames are decoded, so that the size can be checked.
    """
    found = output[0]  # frames, or images
    if isinstance(found, Tensor) and found.ndim == 4:
        policy.makes_images, found = True, found[:, None]
    if not isinstance(found, Tensor) or found.ndim != 5:
        raise PolicyError(
            f"{type(policy.pipeline).__name__} returned no video tensor for output_type='pt' "
            f"({type(found).__name__}); a policy needs frames (B, F, 3, H, W) or images (B, 3, H, W)."
        )
    if whole:
        check_video(policy.pipeline, policy.pipeline_kwargs, found.shape)
    return found


@contextlib.contextmanager
def _swapped(session: Session) -> Iterator[None]:
    """Give the pipeline our scheduler, prompt memo and denoiser entry while the context is open."""
    policy, pipeline = session.policy, session.policy.pipeline
    scheduler = pipeline.scheduler
    own_encoder, own_bar = vars(pipeline).get("encode_prompt"), vars(pipeline).get("_progress_bar_config")
    own_forwards = {name: vars(module).get("forward") for name, module in policy.denoiser.items()}
    pipeline.scheduler = stochastic(policy.scheduler, session)
    pipeline.encode_prompt = policy.prompt_memo
    pipeline.set_progress_bar_config(**(own_bar or {}) | {"disable": True})
    for name, module in policy.denoiser.items():
        module.forward = _entry(session, name, module.forward)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        for owner, attribute, value in [
            (pipeline, "encode_prompt", own_encoder),
            (pipeline, "_progress_bar_config", own_bar),
            *((module, "forward", own_forwards[name]) for name, module in policy.denoiser.items()),
        ]:
            delattr(owner, attribute) if value is None else setattr(owner, attribute, value)


def _entry(session: Session, name: str, forward: Callable) -> Callable:
    """Return the denoiser's forward, skipped if the session does not need its output."""
    policy = session.policy

    def entry(*args, **kwargs):
        rows = next(t.shape[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim > 1)
        plain = {k: v for k, v in session.conditions.items() if isinstance(v, (bool, int, float, str))}
        # Guidance changes the number of rows, between runs and (LTX-2) between calls.
        key = name, repr(sorted((plain | session.overrides).items())), rows / len(session.prompts)
        known = key in policy.skipped_outputs
        if plain and not session.needs_prediction:  # other ranks' videos may have other conditions
            known = not policy.agreed(int(not known))
        if not session.needs_prediction and known:
            meta, videos = policy.skipped_outputs[key]
            return tree_map(lambda t: _zeros(t, len(session.prompts), videos, policy.device), meta)
        if policy.mesh is not None and policy.prompt_memo.pad and not session.lengths_agreed:
            # If prompts differ in length on one rank, all ranks run by length from here on.
            policy.prompt_memo.padded = bool(policy.agreed(int(policy.prompt_memo.padded)))
            session.lengths_agreed = True
        own = functools.partial(by_length, forward, policy.agreed) if policy.prompt_memo.padded else forward
        # A call uses each weight once, so a cache would only keep all trained weights' casts until the call ends.
        cast = torch.autocast(
            policy.device.type, policy.autocast_dtype, enabled=policy.autocast_dtype is not None, cache_enabled=False
        )
        divided = tokens_divide() if policy.shares_tokens else contextlib.nullcontext()
        with attention_kernel(policy.attention_kernel), cast, divided:
            output = own(*args, **kwargs)
        if policy.mesh is not None:  # the hook that gathers for backward needs an output that is not a view
            output = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)
        if key not in policy.skipped_outputs:
            to_meta = tree_map(lambda t: t.detach().to("meta") if isinstance(t, Tensor) else t, output)
            policy.skipped_outputs[key] = to_meta, len(session.prompts)
        return output

    return entry


def _zeros(template, videos: int, recorded_videos: int, device: torch.device):
    """Return zeros instead of a skipped denoiser output, with as many rows as the batch needs."""
    if not isinstance(template, Tensor):
        return template
    rows = template.shape[0] * videos // recorded_videos
    return torch.zeros((rows, *template.shape[1:]), dtype=template.dtype, device=device)
