"""Keep idle components in host memory: text encoders, autoencoder, denoisers.

Frozen weights never change, so their copy in host memory stays: loading a part copies it to the device, and unloading
drops the device's copy, without a copy back. Only one offloaded part is on the device at a time, plus those that a
graph still needs. Trained weights (adapters) and buffers stay on the device.

How: each such component has an accelerate hook, from which diffusers' pipelines read the device they work on, wherever
the weights are; so the pipeline also works as before outside a policy.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..schedule.scheduler import PolicyError
from ..sharded.sharding import is_sharded

OFFLOADED = ("text_encoder", "vae", "denoiser")  # kinds of components
BUCKET = 2**30  # bytes; torch rounds pinned memory up to a power of two, so one allocation per tensor would waste much
ALIGNMENT = 64


def kind_of(name: str) -> str | None:
    """Return the kind of a component by its name: text_encoder (also image encoders), vae, denoiser, or None."""
    if name.startswith("text_encoder") or name == "image_encoder":
        return "text_encoder"
    if name == "vae" or name.endswith("_vae"):
        return "vae"
    return "denoiser" if name.split("_")[0] in ("transformer", "unet") else None


def place(pipeline: DiffusionPipeline, device: torch.device | str, offload: Sequence[str] = ()) -> None:
    """Move a pipeline to a device; components of the kinds in `offload` are there only while they are used.

    A text encoder or an autoencoder leaves the device when its call ends; a denoiser leaves when another offloaded
    part is used, or by `leave_idle`. A part whose output requires gradients stays until they have been computed. An
    earlier `place` is undone.

    Raises:
        PolicyError: the pipeline has no component of a kind, or a component's weights are quantised, sharded or all
            trained.
    """
    device = torch.device(device)
    modules = {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}
    kinds = {kind_of(name) for name in modules}
    if isinstance(offload, str) or set(offload) - set(OFFLOADED) or set(offload) - kinds:
        known = [kind for kind in OFFLOADED if kind in kinds]
        raise PolicyError(f"offload={offload!r}: {type(pipeline).__name__} has {known}; name some of them in a list.")
    for module in modules.values():
        _bring_back(module)
    together: list[Part] = []
    for name, module in modules.items():
        if kind_of(name) in offload and _part(module) is None:
            _check_plain(name, module)
            together.append(Part(module, kind_of(name), device, together))
    for module in modules.values():
        if _part(module) is None and not is_sharded(module):  # a sharded one is already in place
            module.to(device)


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a component works on, wherever its weights are now."""
    part = _part(module)
    return next(module.parameters()).device if part is None else part.execution_device


@contextlib.contextmanager
def resident(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the weights of all these components on the device while the context is open."""
    parts = [part for part in map(_part, modules) if part is not None]
    for part in parts:
        part.held += 1
    try:
        for part in parts:
            part.enter()
        yield
    finally:
        for part in parts:
            part.held -= 1
        for part in parts:
            if not part.lingers:
                part.leave()


def leave_idle(pipeline: DiffusionPipeline) -> None:
    """Move offloaded components off the device, except those that a graph still needs."""
    for component in pipeline.components.values():
        part = _part(component)
        if part is not None:
            part.leave()


class Part(ModelHook):
    """The offloading hook of one component, which moves its frozen weights.

    Args:
        module: the component.
        kind: one of `OFFLOADED`.
        device: the device it works on.
        together: all parts of the pipeline.
    """

    def __init__(self, module: nn.Module, kind: str, device: torch.device, together: list["Part"]):
        self.execution_device, self.together = device, together
        self.lingers = kind == "denoiser"  # a denoiser is called many times: it stays until another part is used
        self.methods = ("decode", "encode") if kind == "vae" else ()  # called instead of its forward
        self.is_resident, self.held = False, 0
        self.waiting: weakref.WeakSet[_Graph] = weakref.WeakSet()
        for tensor in [*module.buffers(), *(p for p in module.parameters() if p.requires_grad)]:
            tensor.data = tensor.data.to(device)
        self.frozen = [p for p in module.parameters() if not p.requires_grad]
        self.host = list(_packed(self.frozen, pin=device.type == "cuda"))
        add_hook_to_module(module, self)
        for name in self.methods:
            own = getattr(module, name)
            setattr(module, name, functools.wraps(own)(functools.partial(self._call, own)))

    def __deepcopy__(self, memo) -> "Part":
        return self  # a copy of the component that shares its weights also shares this hook

    def pre_forward(self, module, *args, **kwargs):
        self.enter()
        return args, kwargs

    def post_forward(self, module, output):
        self._finish(output)
        return output

    def _call(self, own, *args, **kwargs):
        self.enter()
        output = own(*args, **kwargs)
        self._finish(output)
        return output

    def _finish(self, output) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._wait_for(leaf)
        if not self.lingers:
            self.leave()

    def _wait_for(self, output: Tensor) -> None:
        """Keep the weights until the output's gradient is computed or its graph is freed: backward needs them."""
        graph = _Graph()
        self.waiting.add(graph)
        output.register_hook(lambda gradient: self.waiting.discard(graph))

    def enter(self) -> None:
        """Move the weights to the device, after moving other parts off it."""
        for part in self.together:
            if part is not self:
                part.leave()
        if not self.is_resident:
            self.is_resident = True
            for parameter, host in zip(self.frozen, self.host):
                parameter.data = host.to(self.execution_device, non_blocking=True, copy=True)

    def leave(self) -> None:
        """Move the weights off the device, unless `resident` holds them or a graph needs them."""
        if self.is_resident and not self.held and not self.waiting:
            self.is_resident = False
            for parameter, host in zip(self.frozen, self.host):
                parameter.data = host


class _Graph:
    """A marker that lives as long as an output's graph, whose hook holds it."""


def _part(component) -> Part | None:
    hook = vars(component).get("_hf_hook") if isinstance(component, nn.Module) else None
    return hook if isinstance(hook, Part) else None


def _bring_back(module: nn.Module) -> None:
    part = _part(module)
    if part is None:
        return
    for name in part.methods:
        delattr(module, name)
    remove_hook_from_module(module)
    for parameter, host in zip(part.frozen, part.host):
        parameter.data = host


def _check_plain(name: str, module: nn.Module) -> None:
    if all(parameter.requires_grad for parameter in module.parameters()):
        raise PolicyError(f"offload: {name} has no frozen weights; call its requires_grad_(False) first.")
    for key, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor or hasattr(parameter, "ds_id"):
            raise PolicyError(
                f"offload: {key} of {name} is a {type(parameter).__name__} of {type(parameter.data).__name__} "
                f"(quantised or sharded weights), which cannot be offloaded; leave {kind_of(name)!r} out of offload."
            )


def _packed(parameters: list[nn.Parameter], pin: bool) -> Iterator[Tensor]:
    """Move each parameter to host memory, in few allocations; pinned memory is read at full speed."""
    sizes = [-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in parameters]
    left, used, bucket = sum(sizes), 0, torch.empty(0, dtype=torch.uint8)
    for parameter, size in zip(parameters, sizes):
        if used + size > bucket.numel():
            bucket, used = torch.empty(max(size, min(BUCKET, left)), dtype=torch.uint8, pin_memory=pin), 0
        own = bucket[used : used + parameter.numel() * parameter.element_size()].view(parameter.dtype)
        own = own.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())
        own.copy_(parameter.data)
        parameter.data = own
        used, left = used + size, left - size
        yield own
