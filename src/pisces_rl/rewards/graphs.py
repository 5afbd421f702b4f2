"""Run functions of CUDA tensors that are called often with the same shapes as CUDA graphs: one launch for many."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

MOST = 16  # largest number of graphs kept
_graphs: OrderedDict = OrderedDict()


class _Graph:
    """A captured call, and the tensors that it reads and writes."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]):
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
            torch._foreach_copy_(self.inputs, list(tensors))
            function(*self.inputs)  # compilation on the first call must not be captured
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
    """Run function(*tensors), without gradients, as a CUDA graph. Return None on the first call with a key and these
    shapes, and outside the main thread (capture waits for the whole device, which another thread may be using).

    Args:
        key: identifies what the function does besides its tensors.
        function: must not wait for the device.
        tensors: its arguments.

    Returns:
        Tensors that the next call with the same key overwrites.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    shapes = tuple((t.shape, t.dtype) for t in tensors)
    key = key, shapes, tensors[0].device, torch.cuda.current_stream(tensors[0].device)
    first = key not in _graphs
    if not first and _graphs[key] is None:
        _graphs[key] = _Graph(function, tensors)
    _graphs.setdefault(key, None)
    _graphs.move_to_end(key)
    while len(_graphs) > MOST:
        _graphs.popitem(last=False)
    return None if first else _graphs[key](tensors)
