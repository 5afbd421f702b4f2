"""How much memory a GRPO run takes on each GPU: counted on fake tensors, without weights and without a GPU."""

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
from .calls import Recording, tensors
from .live_bytes import AsOnCUDA
from .networks import Call, Networks, bytes_of
from .weightless import silenced_warnings

REMEMBERED_PROMPTS = 256  # size of policy.prompts.PromptMemo
MEASURE = "Measure a run of a few steps instead (torch.cuda.max_memory_allocated)."


@dataclass
class MemoryEstimate:
    """Bytes on one GPU.

    Attributes:
        resident: {what: bytes} that is there from the first optimizer step on; weights under their component's name.
        phases: {"sampling", "decoding", "update": {what: bytes}} that a phase holds besides at its peak; and "text"
            where text encoders are offloaded.
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
            copies = {"optimizer states": resident, "adapter's average": resident,
                      "gradients of earlier steps": phases["update"]}
            for name, parts in copies.items():
                if name in parts:
                    parts[name] = -(-parts[name] // num_processes)
            phases["update"]["gathered gradients"] = gradients
        return MemoryEstimate(resident, phases, self.blocks, self.details)


def estimate_memory(pipeline: DiffusionPipeline, args, peft_config: LoraConfig | str | None = None) -> MemoryEstimate:
    """Memory that `VideoGRPOTrainer(model=pipeline, args=args, peft_config=peft_config)` takes on each GPU.

    Networks, guidance, recomputation, offloading and the adapter are the run's own; their operators run on fake
    tensors, and what lives at the same time is added up. Not counted: rewards, evaluation, auxiliary losses, the
    CUDA context, workspaces of kernels, and what the allocator loses to fragmentation. Where blocks are compiled,
    temporaries are counted as if no two operators were fused. Prompts are as long as they may be.

    Args:
        pipeline: with weights or without (`weightless_pipeline`); it is not changed.
        args: a `VideoGRPOConfig`; its bf16 is the autocast's, the weights' dtype is the pipeline's.
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
    adapter = bytes_of(networks.adapter.values())
    micro = args.per_device_train_batch_size
    videos = micro * args.steps_per_generation
    chunk = min(args.rollout_batch_size or videos, videos)
    sampled, trained = Recording(networks, chunk), Recording(networks, micro)

    resident = dict(networks.weights) | ({} if networks.full else {"adapter": adapter})
    resident["optimizer states"] = 2 * adapter
    if args.ema_decay:
        resident["adapter's average"] = adapter
    resident["prompt embeddings"] = remembered_prompts(args, videos) * sampled.prompt_bytes

    low, high = args.sde_window_range or (0, args.num_inference_steps - 1)
    steps = args.sde_window_size or high - low
    states = (2 * steps + 1) * sampled.latent_bytes * videos  # of every trained step, and its mean
    decoding, video = decoding_peak(networks, sampled)
    if chunk < videos:
        decoding = max(decoding, video * videos)  # the parts are joined
    rollout = {"states of two rollouts": 2 * states, "videos": video * videos}  # the last one's are still there
    phases = {
        "sampling": rollout | {"denoiser": max(sampling_peak(networks, step) for step in sampled.steps)},
        "decoding": rollout | {"decoder": decoding},
        "update": {"states": states, "gradients of earlier steps": adapter,
                   "activations and gradients": max(update_peak(networks, step) for step in trained.steps)},
    }  # fmt: skip
    away = {kind: {name: resident.pop(name) for name in networks.weights if kind_of(name) == kind}
            for kind in args.offload or ()}  # fmt: skip
    if "text_encoder" in away:
        phases["text"] = away["text_encoder"]
    phases["decoding"] |= away.get("vae", {})
    if "denoiser" in away:  # one at a time
        name, size = max(away["denoiser"].items(), key=lambda item: item[1])
        phases["sampling"][name] = phases["update"][name] = size
    rows = [t.shape[0] for call in trained.steps[0] for t in tensors(call) if t.ndim > 2]
    details = {"videos of a rollout": videos, "videos sampled at once": chunk, "videos of a micro-batch": micro,
               "rows of a denoiser's call in the update": max(rows),
               "calls of a denoising step": len(trained.steps[0]), "trained steps": steps,
               "trainable parameters": adapter // 4}  # fmt: skip
    return MemoryEstimate(resident, phases, networks.blocks, details)


def remembered_prompts(args, videos: int) -> int:
    """How many prompts a process remembers at the end of a run whose rollouts give it so many videos; the most where
    the data set says how long the run is."""
    if args.max_steps < 1:
        return REMEMBERED_PROMPTS
    uses = args.steps_per_generation * args.num_iterations  # micro-batches of a rollout
    rollouts = -(-args.max_steps * args.gradient_accumulation_steps // uses)
    return min(REMEMBERED_PROMPTS, rollouts * max(1, videos // args.num_generations))


def sampling_peak(networks: Networks, step: list[Call]) -> int:
    """Bytes at the peak of one denoising step without gradients, without weights; step: of `Recording.steps`."""
    with torch.no_grad(), networks.counting(step) as count:
        kept = [networks.run(*call) for call in step]
    del kept
    return count.peak


def update_peak(networks: Networks, step: list[Call]) -> int:
    """Bytes at the peak of one trained step with its backward, gradients of the adapter among them.

    A step of a denoiser without an adapter has no backward. All weights' gradients are as large as the weights: there
    each is added to those of earlier steps, which are left out, and is gone before the next one comes.
    """
    count = networks.counting(step)
    for parameter in networks.adapter.values() if networks.full else ():
        with networks.mode:
            parameter.grad = torch.zeros_like(parameter)
        count.leave_out(parameter.grad)
    with torch.enable_grad(), networks.mode, count, AsOnCUDA():
        outputs = [networks.run(*call) for call in step]
        losses = [t.float().square().mean() for t in tensors(outputs) if t.requires_grad]
        del outputs
        if losses:
            # loss.backward() is itself what AsOnCUDA sees, and would run without it while blocks are computed again
            Variable._execution_engine.run_backward(
                tuple(losses), tuple(map(torch.ones_like, losses)), False, False, (), allow_unreachable=True,
                accumulate_grad=True,
            )  # fmt: skip
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
