"""`pisces-rl env`: print the versions and hardware that a bug report needs."""

import argparse
import os
import platform

from pisces_rl import __version__

from .help_table import installed

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "geomloss",
    "deepspeed",
    "numpy",
    "av",
)


def environment() -> dict[str, str]:
    """Return versions, platform and GPUs by name."""
    import torch

    found = {"pisces_rl": __version__, "platform": platform.platform(), "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = installed(name)
    found["CUDA of torch"] = torch.version.cuda or "none"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found["GPUs"] = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus) or "none"
    found["CPU cores"] = str(os.cpu_count())
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> None:
    for name, value in environment().items():
        print(f"- {name}: {value}")
