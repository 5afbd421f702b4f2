"""A pipeline's networks as in a run, on fake tensors: with adapters on the denoisers and recomputed blocks."""

import copy
import warnings

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from ..policy import FULL, FullWeights, VideoPolicy, add_lora, lora_parameters, read_adapter
from ..policy.fast.execution import repeated_blocks
from .live_bytes import AsOnCUDA, LiveBytes
from .weightless import replaced_tensors

Call = tuple[str, tuple, dict]  # component, args and kwargs of its forward or of the VAE's decode; fake tensors


class Networks:
    """A pipeline's networks on fake tensors, by component name.

    Args:
        pipeline: any text-to-video pipeline of diffusers; it is not changed, and its weights are not read.
        args: a trainer's config.
        peft_config: the adapter's config, or "full".

    Attributes:
        weights: {component: bytes of its parameters and buffers}, before adapters.
        blocks: {denoiser: bytes of each repeated block}, before adapters.
        adapter: trainable parameters by name.
        full: whether these are all weights of the denoisers.
        policy: the policy of a copy of the pipeline with these networks.
    """

    def __init__(self, pipeline: DiffusionPipeline, args, peft_config: LoraConfig | str | None):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        pipeline = copy.copy(pipeline)
        modules = {
            name: replaced_tensors(module, "meta")
            for name, module in pipeline.components.items()
            if isinstance(module, nn.Module)
        }
        for name, module in modules.items():
            setattr(pipeline, name, module)
        self.policy = VideoPolicy(
            pipeline, **args.policy_settings()
        )  # checks the settings and sets how the VAE decodes
        denoisers = dict(self.policy.denoiser.items())
        for module in modules.values():
            module.requires_grad_(False).eval()
        self.full = peft_config == FULL
        if self.full:
            FullWeights(denoisers, args.lora_denoisers)
        self.policy.set_base_precision(args.base_precision)
        self.weights = {name: bytes_of([*module.parameters(), *module.buffers()]) for name, module in modules.items()}
        self.blocks = {
            name: [bytes_of(block.parameters()) for block in repeated_blocks(denoiser)]
            for name, denoiser in denoisers.items()
        }
        continued = read_adapter(args.continue_from) if args.continue_from else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # there are no values
            if not self.full:
                add_lora(denoisers, peft_config, args.lora_denoisers, continued)
        with self.mode:
            self.modules = {name: replaced_tensors(module, "cpu") for name, module in modules.items()}
        for name, module in self.modules.items():
            setattr(pipeline, name, module)
        self.denoisers = {name: self.modules[name] for name in denoisers}
        self.policy.denoiser.update(self.denoisers)
        if args.torch_compile:  # the same blocks and recomputation, without a compiler
            self.policy.compile_blocks(args.recompute if args.gradient_checkpointing else "nothing", backend=None)
        elif args.gradient_checkpointing:
            self.policy.activation_checkpointing_enable()
        self.adapter = lora_parameters(self.denoisers)

    def fake(self, value):
        """Replace the real tensors in a structure by fake ones."""

        def one(leaf):
            real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
            return self.mode.from_tensor(leaf) if real else leaf

        return tree_map(one, value)

    def run(self, name: str, args: tuple, kwargs: dict):
        """Run a call on fake tensors; denoisers run under autocast."""
        dtype, module = self.policy.autocast_dtype, self.modules[name]
        autocast = torch.autocast(
            "cpu", dtype or torch.bfloat16, cache_enabled=False, enabled=dtype is not None and name in self.denoisers
        )  # as a run's
        with self.mode, AsOnCUDA(), autocast:
            return (module.decode if name == "vae" else module)(*args, **kwargs)

    def counting(self, inputs) -> LiveBytes:
        """Return a count that excludes the weights and includes `inputs`."""
        count = LiveBytes()
        for module in self.modules.values():
            count.leave_out([*module.parameters(), *module.buffers()])
        count.hold(inputs)
        return count


def bytes_of(values) -> int:
    """Return the total bytes of tensors; duplicates count once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in values}.values())
