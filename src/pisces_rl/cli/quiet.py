"""What a log has no use for, turned off by the programs, never by importing the package."""

import logging
import sys
import warnings

_ACCELERATOR = ("Setting accelerator to", "Setting ds_accelerator to")  # how DeepSpeed greets whoever imports it


def _says_more(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ACCELERATOR)


def quiet() -> None:
    """Silence DeepSpeed's greeting and PyTorch's warning on pin_memory without a GPU; where stderr is no terminal, the
    bars of loading, too. Call it before any work."""
    logging.getLogger("DeepSpeed").addFilter(_says_more)
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
