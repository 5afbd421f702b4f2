"""Compile a denoiser's repeated blocks, and choose its attention kernel and what backward recomputes.

Sampling and update must be bitwise the same computation, but a compiler generates different kernels for a function
with and without gradients. So a compiled block runs the graph with gradients in both. While sampling, its inputs and
output are detached, so that what the graph would keep for backward is freed immediately.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..schedule.scheduler import PolicyError

#: Attention kernels by name, each with its fallbacks if it does not support a case (a mask, a head size, a device).
ATTENTION_KERNELS = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "math": (SDPBackend.MATH,),
}
_ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
RECOMPUTE = ("nothing", "all_but_attention", "everything")


def attention_kernel(name: str | None) -> contextlib.AbstractContextManager:
    """Return a context in which scaled_dot_product_attention prefers the named kernel; None: torch chooses."""
    return contextlib.nullcontext() if name is None else sdpa_kernel(list(ATTENTION_KERNELS[name]), set_priority=True)


def checkpointed(kernel: Callable[[], str | None]) -> Callable:
    """Return the function by which diffusers calls a block under gradient checkpointing; backward recomputes the block
    with the same attention kernel, which `kernel` returns."""

    def call(block: nn.Module, *args):
        return checkpoint(
            block.__call__,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), attention_kernel(kernel())),
        )

    return call


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks that a denoiser repeats, according to diffusers' lists of their classes."""
    names = set(denoiser._repeated_blocks or denoiser._no_split_modules or ())
    return [module for module in denoiser.modules() if names & {cls.__name__ for cls in type(module).__mro__}]


def compile_blocks(
    denoiser: nn.Module,
    *,
    recompute: str = "all_but_attention",
    backend: str | None = "inductor",
    mode: str | None = None,
) -> int:
    """Compile each repeated block of a denoiser; blocks of one class share their kernels.

    Args:
        denoiser: the denoiser.
        recompute: what backward recomputes instead of keeping: "nothing"; "all_but_attention", everything except the
            outputs of attention; "everything".
        backend: of `torch.compile`; None runs the same without a compiler (to count its memory).
        mode: of `torch.compile`.

    Returns:
        The number of blocks.

    Raises:
        PolicyError: diffusers lists no repeated blocks for this class.
    """
    blocks = repeated_blocks(denoiser)
    if not blocks:
        raise PolicyError(
            f"{type(denoiser).__name__} lists no repeated blocks (_repeated_blocks, _no_split_modules), so there is "
            "nothing to compile block by block; leave torch_compile off."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # batch sizes, adapters off
    run = _RUNS[recompute]
    if backend is not None:
        run = torch.compile(run, backend=backend, mode=mode, dynamic=False, fullgraph=True)
    carried: dict[type, set] = {}
    for block in blocks:
        block.forward = CompiledBlock(block, run, carried.setdefault(type(block), set()))
    return len(blocks)


@contextlib.contextmanager
def plain_blocks(module: nn.Module) -> Iterator[None]:
    """Run the blocks of `compile_blocks` uncompiled while the context is open."""
    held = {
        block: vars(block)["forward"]
        for block in module.modules()
        if isinstance(vars(block).get("forward"), CompiledBlock)
    }
    uncompile_blocks(module)
    try:
        yield
    finally:
        for block, forward in held.items():
            block.forward = forward


def uncompile_blocks(module: nn.Module) -> None:
    """Undo `compile_blocks`, in a module or a copy of one."""
    for block in module.modules():
        if isinstance(vars(block).get("forward"), CompiledBlock):
            del block.forward


class CompiledBlock:
    """A block's forward as one compiled graph with gradients, for both sampling and update."""

    def __init__(self, block: nn.Module, run, carried: set):
        self.block, self.run, self.carried = block, run, carried

    def __call__(self, *args, **kwargs):
        named = {**dict(enumerate(args)), **kwargs}
        if not self.carried:  # inputs with an output's shape are taken to be the previous block's outputs
            with torch.no_grad():
                shapes = [
                    o.shape
                    for o in tree_leaves(type(self.block).forward(self.block, *args, **kwargs))
                    if isinstance(o, Tensor)
                ]
            tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
            self.carried |= {key for key, value in tensors.items() if value.shape in shapes} or {next(iter(tensors))}
        grad = torch.is_grad_enabled()
        for key in self.carried & set(named):
            if not (grad and named[key].requires_grad):
                named[key] = named[key].detach().requires_grad_()
        positional = [named[i] for i in range(len(args))]
        with torch.enable_grad():
            try:
                output = self.run(
                    type(self.block).forward, self.block, *positional, **{key: named[key] for key in kwargs}
                )
            except torch._dynamo.exc.Unsupported as error:
                raise PolicyError(
                    f"{type(self.block).__name__} cannot be compiled as one graph (LTX-2's blocks branch on a "
                    "tensor's values); leave torch_compile off."
                ) from error
        return output if grad else tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)


# The class's function is an argument: dynamo does not look into classes that diffusers marks as allowed in a graph.


def _run(forward: Callable, block: nn.Module, *args, **kwargs):
    return forward(block, *args, **kwargs)


def _recompute(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _run_recomputed(forward: Callable, block: nn.Module, *args, **kwargs):
    # With a policy: without one, torch 2.11 marks no operator inside an autograd.Function, and keeps its products.
    contexts = functools.partial(create_selective_checkpoint_contexts, _recompute)
    return checkpoint(forward, block, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _keep_attention(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _run_keeping_attention(forward: Callable, block: nn.Module, *args, **kwargs):
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(forward, block, *args, use_reentrant=False, context_fn=contexts, **kwargs)


_RUNS = {"nothing": _run, "all_but_attention": _run_keeping_attention, "everything": _run_recomputed}
