"""How much memory a run takes on each GPU: counted on fake tensors, without weights and without a GPU."""

import contextlib
import copy
import inspect
import warnings
from dataclasses import dataclass

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
    """What a method holds on a device beside the model, what is trained of it, and the optimizer's states.

    Attributes:
        sampled: videos of one call of the pipeline.
        trained: videos whose predictions carry a graph at the same time.
        prompts: different ones of `uses` micro-batches.
        rollout: videos that are sampled before they are trained on; 0: they are not kept.
        latents: how many are kept of each of these, in fp32.
        predictions: of other policies, in fp32, beside the graph, for each trained video.
        followers: further copies of what is trained.
        drawn_by_follower: whether one of them samples; the trained weights, for which it then stands in, wait in a
            copy.
        graphs: denoising steps whose graphs live at the same time.
        decoder: whether the graph goes on through it; "checkpointed": it is computed again in backward.
        decode_frames: of how many latent frames; None: all.
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
        resident: {what: bytes} that is there from the first optimizer step on; weights under their component's name.
        phases: {"sampling", "decoding", "update": {what: bytes}} that a phase holds besides at its peak; and "text"
            where text encoders are offloaded. Reward backpropagation decodes in its update.
        blocks: {denoiser: bytes of each repeated block}.
        details: the numbers behind it: videos at a time, rows of a denoiser's call, trainable parameters.
    """

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    blocks: dict[str, list[int]]
    details: dict[str, int]

    @property
    def peaks(self) -> dict[str, int]:
        """{phase: bytes at its peak, with what is resident}."""
        always = sum(self.resident.values())
        return {name: always + sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def fsdp2(self, num_processes: int) -> "MemoryEstimate":
        """The same with the denoisers sharded by their blocks over several GPUs, and with them, where they are trained
        whole, their gradients, averages and optimizer states; everything else stays whole.

        While a denoiser runs, what is in none of its blocks is gathered, and three blocks' bytes: the block that runs,
        the next one, and the message that brings it. Gradients are whole of what is in none of the blocks, and of two
        blocks: one, and the message that reduces it.
        """
        if num_processes < 2:
            raise ValueError(f"num_processes={num_processes}: fsdp2 needs at least 2 GPUs to share weights.")
        resident, gathered, gradients = dict(self.resident), 0, 0
        phases = {name: dict(parts) for name, parts in self.phases.items()}
        for name, blocks in self.blocks.items():
            if name not in resident:
                raise ValueError("offload: denoisers that are sharded cannot be offloaded; leave 'denoiser' out.")
            outside, block = self.resident[name] - sum(blocks), max(blocks, default=0)
            gathered, gradients = max(gathered, outside + 3 * block), max(gradients, outside + 2 * block)
            resident[name] = -(-self.resident[name] // num_processes)
        phases["sampling"]["gathered weights"] = phases["update"]["gathered weights"] = gathered
        if "adapter" not in self.resident:
            for parts in (resident, *phases.values()):
                parts |= {name: -(-parts[name] // num_processes) for name in OF_TRAINED if name in parts}
            phases["update"]["gathered gradients"] = gradients
        return MemoryEstimate(resident, phases, self.blocks, self.details)


def estimate_memory(pipeline: DiffusionPipeline, args, peft_config: LoraConfig | str | None = None) -> MemoryEstimate:
    """Memory that the trainer of `args` takes on each GPU, with this model and peft_config.

    Networks, guidance, recomputation, offloading and the adapter are the run's own; their operators run on fake
    tensors, and what lives at the same time is added up. Not counted: rewards, evaluation, auxiliary losses, the
    CUDA context, workspaces of kernels, and what the allocator loses to fragmentation. Where blocks are compiled,
    temporaries are counted as if no two operators were fused. Prompts are as long as they may be.

    Args:
        pipeline: with weights or without (`weightless_pipeline`); it is not changed.
        args: the config of any trainer, whose `held` says what the method holds; its bf16 is the autocast's, the
            weights' dtype is the pipeline's.
        peft_config: as the trainer's. With "full" the denoisers' own weights are the fp32 ones that are trained, and
            there is no "adapter".

    Raises:
        ValueError: a network branches on numbers in a tensor, or each video comes with an image.
        PolicyError: the pipeline cannot be a policy, or torch_compile is on and it has no blocks to compile.
    """
    args = copy.copy(args)
    args.settle_call(assets.call_defaults(pipeline.name_or_path or ""))
    images = args.image_columns  # unset: as in trainers.images.image_columns
    if images is None and "image" in inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters:
        images = ["image"]
    if images:
        raise ValueError(
            f"{type(pipeline).__name__} takes {images} with each video, which are not known here. {MEASURE}"
        )
    with silenced_warnings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autocast.*|.*does not support gradient checkpointing")
        try:
            return _estimate(Networks(pipeline, args, peft_config), args)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(pipeline).__name__}: one of its networks branches on numbers in a tensor ({error}; "
                f"HunyuanVideo 1.5 asks whether image embeddings are all 0), and here tensors have none. {MEASURE}"
            ) from error


def _estimate(networks: Networks, args) -> MemoryEstimate:
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
    if held.followers:  # or the trained weights' copy, while a follower stands in for them
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
        "videos of a rollout": held.rollout,
        "videos sampled at once": held.sampled,
        "videos with a graph": held.trained,
        "rows of a denoiser's call in the update": max(rows),
        "calls of a denoising step": len(trained.steps[0]),
        "latents kept of a video": held.latents,
        "trainable parameters": weights // 4,
    }
    return MemoryEstimate(resident, phases, networks.blocks, details)


def remembered_prompts(args) -> int:
    """How many prompts a process remembers at the end of a run; the most where the data set says how long it is."""
    if args.max_steps < 1:
        return REMEMBERED_PROMPTS
    held, micro_batches = args.held(), args.max_steps * args.gradient_accumulation_steps
    return min(REMEMBERED_PROMPTS, -(-micro_batches // held.uses) * held.prompts)


def sampling_peak(networks: Networks, step: list[Call]) -> int:
    """Bytes at the peak of one denoising step without gradients, without weights; step: of `Recording.steps`."""
    with torch.no_grad(), networks.counting(step) as count:
        kept = [networks.run(*call) for call in step]
    del kept
    return count.peak


def update_peak(networks: Networks, trained: Recording, step: list[Call], held: Held) -> int:
    """Bytes at the peak of as many steps with a graph as live at once, and its backward, gradients of the adapter
    among them.

    A step of a denoiser without an adapter has no backward. All weights' gradients are as large as the weights: there
    each is added to those of earlier steps, which are left out, and is gone before the next one comes.
    """
    calls, decoder = step * held.graphs, contextlib.nullcontext()
    if held.decoder is not None:
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
            # loss.backward() is itself what AsOnCUDA sees, and would run without it while blocks are computed again
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
    """Bytes at the peak of decoding, the videos in fp32 included, and of one such video."""
    if sampled.vae is None:
        return 0, 0
    with torch.no_grad(), networks.counting(sampled.vae) as count:
        video = tensors(networks.run(*sampled.vae))[0]
        pixels = video.numel() * 4
        del video
    return max(count.peak, 3 * pixels), pixels // len(sampled.prompts)  # scaled to [0, 1], stacked, in fp32
