"""Estimate a run's memory per GPU on fake tensors, without weights or a GPU."""

import contextlib
import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd import Variable

from .. import assets
from ..policy.pipeline.offload import kind_of
from ..policy.sessions.backprop import decoding
from .calls import Recording, tensors
from .live_bytes import AsOnCUDA
from .networks import Call, Networks, bytes_of
from .weightless import silenced_warnings

REMEMBERED_PROMPTS = 256  # size of policy.prompts.PromptMemo
OF_TRAINED = "optimizer states", "adapter's average", "followers", "trained weights", "gradients of earlier steps"
MEASURE = "Measure a run of a few steps instead (torch.cuda.max_memory_allocated)."


@dataclass(frozen=True)
class Held:
    """What a method holds on a device besides the model, its trained weights and the optimizer states.

    Attributes:
        sampled: videos per call of the pipeline.
        trained: videos whose predictions have a graph at the same time.
        prompts: distinct prompts in `uses` micro-batches.
        uses: see `prompts`.
        rollout: videos that are sampled before training on them; 0: they are not kept.
        latents: latents kept of each of these videos, in fp32.
        predictions: predictions of other policies per trained video, in fp32, besides the graph.
        followers: additional copies of the trained weights.
        drawn_by_follower: whether a follower samples; a copy of the trained weights is kept meanwhile.
        graphs: denoising steps whose graphs are alive at the same time.
        decoder: not None if the graph includes the decoder; "checkpointed": it is recomputed in backward.
        decode_frames: latent frames that are decoded; None: all.
    """

    sampled: int
    trained: int
    prompts: int
    uses: int = 1
    rollout: int = 0
    latents: int = 0
    predictions: int = 0
    followers: int = 0
    drawn_by_follower: bool = False
    graphs: int = 1
    decoder: str | None = None
    decode_frames: int | None = None


@dataclass
class MemoryEstimate:
    """Bytes on one GPU.

    Attributes:
        resident: {what: bytes} held from the first optimizer step on; weights under their component's name.
        phases: {"sampling", "decoding", "update": {what: bytes}} held in addition at each phase's peak; also "text" if
            text encoders are offloaded. Reward backpropagation decodes in its update.
        blocks: {denoiser: bytes of each repeated block}.
        details: numbers behind the estimate: videos at a time, rows per denoiser call, trainable parameters.
    """

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    blocks: dict[str, list[int]]
    details: dict[str, int]

    @property
    def peaks(self) -> dict[str, int]:
        """{phase: bytes at its peak, including the resident ones}."""
        always = sum(self.resident.values())
        return {name: always + sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def fsdp2(self, num_processes: int) -> "MemoryEstimate":
        """Return the estimate with the denoisers sharded by block over several GPUs. If all their weights are trained,
        their gradients, averages and optimizer states are sharded too; everything else is replicated.

        While a denoiser runs, its parameters outside the blocks are gathered, plus three blocks: the running block,
        the next one, and the message that gathers it. Unsharded gradients are those outside the blocks, plus two
        blocks: one block, and the message that reduces it.
        """
        if num_processes < 2:
            raise ValueError(f"num_processes={num_processes}: fsdp2 needs at least 2 GPUs to share weights.")
        resident, gathered, gradients = dict(self.resident), 0, 0
        phases = {name: dict(parts) for name, parts in self.phases.items()}
        for name, blocks in self.blocks.items():
            if name not in resident:
                raise ValueError("offload: sharded denoisers cannot be offloaded; remove 'denoiser'.")
            outside, block = self.resident[name] - sum(blocks), max(blocks, default=0)
            gathered, gradients = max(gathered, outside + 3 * block), max(gradients, outside + 2 * block)
            resident[name] = -(-self.resident[name] // num_processes)
        phases["sampling"]["gathered weights"] = phases["update"]["gathered weights"] = gathered
        if "adapter" not in self.resident:
            for parts in (resident, *phases.values()):
                parts |= {name: -(-parts[name] // num_processes) for name in OF_TRAINED if name in parts}
            phases["update"]["gathered gradients"] = gradients
        return MemoryEstimate(resident, phases, self.blocks, self.details)


def estimate_memory(
    pipeline: DiffusionPipeline, args: Any, peft_config: LoraConfig | str | None = None
) -> MemoryEstimate:
    """Estimate the memory per GPU of the trainer of `args`, with this model and peft_config.

    Networks, guidance, recomputation, offloading and the adapter are those of the run; their operators run on fake
    tensors, and the bytes alive at the same time are summed. Not counted: rewards, evaluation, auxiliary losses, the
    CUDA context, kernel workspaces and fragmentation of the allocator. For compiled blocks, temporaries are counted
    as if no operators were fused. Prompts have the maximum length.

    Args:
        pipeline: with or without weights (`weightless_pipeline`); it is not changed.
        args: the config of any trainer, whose `held` lists what the method holds. Its bf16 sets the autocast; the
            pipeline sets the weights' dtype.
        peft_config: as for the trainer. With "full", all denoiser weights are trained in fp32, without "adapter".

    Raises:
        ValueError: a network branches on values of a tensor, or each video needs an image.
        PolicyError: the pipeline cannot be a policy, or torch_compile is on and it has no blocks to compile.
    """
    args = copy.copy(args)
    args.settle_call(assets.call_defaults(pipeline.name_or_path or ""))
    images = args.image_columns  # unset: as in trainers.images.image_columns
    if images is None and "image" in inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters:
        images = ["image"]
    if images:
        raise ValueError(
            f"{type(pipeline).__name__} takes {images} with each video, whose size is unknown here. {MEASURE}"
        )
    with silenced_warnings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autocast.*|.*does not support gradient checkpointing")
        try:
            return _estimate(Networks(pipeline, args, peft_config), args)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(pipeline).__name__}: one of its networks branches on values of a tensor ({error}; "
                f"HunyuanVideo 1.5 checks whether image embeddings are all 0), but fake tensors have none. {MEASURE}"
            ) from error


def _estimate(networks: Networks, args: Any) -> MemoryEstimate:
    held, weights = args.held(), bytes_of(networks.adapter.values())
    sampled, trained = Recording(networks, held.sampled), Recording(networks, held.trained)

    resident = dict(networks.weights) | ({} if networks.full else {"adapter": weights})
    resident["optimizer states"] = 2 * weights
    if args.ema_decay:
        resident["adapter's average"] = weights
    if held.followers:
        resident["followers"] = held.followers * weights
    resident["prompt embeddings"] = remembered_prompts(args) * sampled.prompt_bytes

    update = {"gradients of earlier steps": weights}
    sampling: dict[str, int] = {"trained weights": weights} if held.drawn_by_follower else {}
    phases = {"sampling": sampling, "update": update}
    if held.rollout:
        decoder, video = decoding_peak(networks, sampled)
        if held.sampled < held.rollout:
            decoder = max(decoder, video * held.rollout)  # the parts are joined
        update["states"] = held.latents * sampled.latent_bytes * held.rollout
        sampling |= {"states of two rollouts": 2 * update["states"], "videos": video * held.rollout}  # the last one's
        phases = {"sampling": sampling, "decoding": sampling | {"decoder": decoder}, "update": update}
    if held.predictions:
        update["predictions of other policies"] = held.predictions * trained.latent_bytes * held.trained
    sampling["denoiser"] = max(sampling_peak(networks, step) for step in sampled.steps)
    update["activations and gradients"] = max(update_peak(networks, trained, step, held) for step in trained.steps)
    if held.followers:  # or the copy of the trained weights while a follower samples
        compared = weights + max(sampling_peak(networks, step) for step in trained.steps)
        update["activations and gradients"] = max(update["activations and gradients"], compared)

    away = {
        kind: {name: resident.pop(name) for name in networks.weights if kind_of(name) == kind}
        for kind in args.offload or ()
    }
    if "text_encoder" in away:
        phases["text"] = away["text_encoder"]
    phases["decoding" if held.rollout else "update"] |= away.get("vae", {})
    if "denoiser" in away:  # one at a time
        name, size = max(away["denoiser"].items(), key=lambda item: item[1])
        sampling[name] = update[name] = size
    rows = [t.shape[0] for call in trained.steps[0] for t in tensors(call) if t.ndim > 2]
    details = {
        "videos per rollout": held.rollout,
        "videos sampled at once": held.sampled,
        "videos per micro-batch": held.trained,
        "rows per denoiser call in the update": max(rows),
        "denoiser calls per step": len(trained.steps[0]),
        "latents recorded per video": held.latents,
        "trainable parameters": weights // 4,
    }
    return MemoryEstimate(resident, phases, networks.blocks, details)


def remembered_prompts(args: Any) -> int:
    """Return how many prompts a process caches by the end of a run, or the maximum if max_steps is not set."""
    if args.max_steps < 1:
        return REMEMBERED_PROMPTS
    held, micro_batches = args.held(), args.max_steps * args.gradient_accumulation_steps
    return min(REMEMBERED_PROMPTS, -(-micro_batches // held.uses) * held.prompts)


def sampling_peak(networks: Networks, step: list[Call]) -> int:
    """Return peak bytes, without weights, of one denoising step (an item of `Recording.steps`) without gradients."""
    with torch.no_grad(), networks.counting(step) as count:
        kept = [networks.run(*call) for call in step]
    del kept
    return count.peak


def update_peak(networks: Networks, trained: Recording, step: list[Call], held: Held) -> int:
    """Return peak bytes of `held.graphs` steps with a graph and their backward, including the adapter's gradients.

    A step of a denoiser without an adapter has no backward. If all weights are trained, each gradient is added to
    those of earlier steps, which are not counted here, and freed before the next one is computed.
    """
    calls = step * held.graphs
    decoder: contextlib.AbstractContextManager = contextlib.nullcontext()
    if held.decoder is not None and trained.vae is not None:
        name, (z, *further), kwargs = trained.vae
        with networks.mode:
            frames = held.decode_frames and held.decode_frames * (1 if z.ndim == 5 else held.trained)
            z = (z[:, :, :frames] if z.ndim == 5 else z[:frames]).detach().requires_grad_()
        calls = [*calls, (name, (z, *further), kwargs)]
        decoder = decoding(trained, None, held.decoder == "checkpointed")
    count = networks.counting(calls)
    for parameter in networks.adapter.values() if networks.full else ():
        with networks.mode:
            parameter.grad = torch.zeros_like(parameter)
        count.leave_out(parameter.grad)
    with torch.enable_grad(), networks.mode, count, AsOnCUDA(), decoder:
        outputs = [networks.run(*call) for call in calls]
        losses = [t.float().square().mean() for t in tensors(outputs) if t.requires_grad]
        del outputs
        if losses:
            # AsOnCUDA would intercept loss.backward() and be inactive while blocks are recomputed
            Variable._execution_engine.run_backward(
                tuple(losses),
                tuple(map(torch.ones_like, losses)),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        del losses
    for parameter in networks.adapter.values():
        parameter.grad = None
    return count.peak


def decoding_peak(networks: Networks, sampled: Recording) -> tuple[int, int]:
    """Return peak bytes of decoding, including the fp32 videos, and bytes of one such video."""
    if sampled.vae is None:
        return 0, 0
    with torch.no_grad(), networks.counting(sampled.vae) as count:
        video = tensors(networks.run(*sampled.vae))[0]
        pixels = video.numel() * 4
        del video
    return max(count.peak, 3 * pixels), pixels // len(sampled.prompts)  # scaled to [0, 1], stacked, in fp32
