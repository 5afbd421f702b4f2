"""Functions of CUDA tensors that are called often with the same shapes, as CUDA graphs: many launches become one."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

MOST = 16  # graphs that a thread keeps
_own = threading.local()


class _Graph:
    """A recorded call, and the tensors that it reads and writes."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]):
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
            torch._foreach_copy_(self.inputs, list(tensors))
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self.inputs, list(tensors))
        self.graph.replay()
        return self.outputs


def by_graph(
    key: Hashable, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...] | None:
    """function(*tensors), without gradients, from a CUDA graph; None at the first call with a key and these shapes.

    Args:
        key: what the function does beside its tensors. function: must not wait for the device; its kernels have run
            before, outside a graph.

    Returns:
        Tensors that the next call with the key overwrites.
    """
    shapes = tuple((t.shape, t.dtype) for t in tensors)
    key = key, shapes, tensors[0].device, torch.cuda.current_stream(tensors[0].device)
    graphs = _own.__dict__.setdefault("graphs", OrderedDict())
    first = key not in graphs
    if not first and graphs[key] is None:
        graphs[key] = _Graph(function, tensors)
    graphs.setdefault(key, None)
    graphs.move_to_end(key)
    while len(graphs) > MOST:
        graphs.popitem(last=False)
    return None if first else graphs[key](tensors)
