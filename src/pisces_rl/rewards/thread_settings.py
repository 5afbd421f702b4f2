"""Pass per-thread settings of torch and Python to another thread."""

import contextlib
import contextvars
from collections.abc import Callable

import torch


def with_settings_of_this_thread(function: Callable) -> Callable:
    """Wrap a function so that another thread can call it, once, with this thread's current settings: default device,
    autocast, gradient mode, context variables, and on a GPU the current device and stream.

    Process-wide settings of torch (precision of fp32 products, attention kernels, default dtype, deterministic
    algorithms, cuDNN's choices) apply in both threads anyway.
    """
    context, grad = contextvars.copy_context(), torch.is_grad_enabled()
    device = torch.get_default_device()
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def call(*args):
        with contextlib.ExitStack() as settings:
            settings.enter_context(torch.set_grad_enabled(grad))
            if device.type != "cpu":  # a device context intercepts every call, so avoid it if possible
                settings.enter_context(device)
            for kind, dtype, enabled in casts:
                if enabled:
                    settings.enter_context(torch.autocast(kind, dtype))
            settings.enter_context(torch.cuda.stream(stream))
            return context.run(function, *args)

    return call
