"""Turn off output that logs do not need. Programs call this; importing the package does not."""

import logging
import sys
import warnings

_ACCELERATOR = ("Setting accelerator to", "Setting ds_accelerator to")  # what DeepSpeed logs on import


def _is_no_greeting(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ACCELERATOR)


def quiet() -> None:
    """Silence DeepSpeed's greeting and PyTorch's pin_memory warning without a GPU and, if stderr is not a terminal,
    loading progress bars. Call it before any work."""
    logging.getLogger("DeepSpeed").addFilter(_is_no_greeting)
    warnings.filterwarnings("ignore", ".*pin_memory.*", UserWarning)
    if sys.stderr.isatty():
        return
    import datasets
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
