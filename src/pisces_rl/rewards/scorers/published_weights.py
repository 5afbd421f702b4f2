"""Published weights: find them, and check that they belong to the expected model before reading any."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def published_folder(
    name: str | Path, scorer: str, patterns: Sequence[str] = ("*.json", "*.txt", "*.safetensors")
) -> Path:
    """Return a folder, or the Hub's snapshot of a model id.

    Raises ValueError with the command that fetches it, if it is neither local nor can be downloaded.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: {scorer} needs {str(name)!r}, which is not a folder and could not be downloaded; run "
            f"`hf download {name}` on a machine with a network, or pass the folder that holds it."
        ) from error


def weights_file(name: str | Path, scorer: str, pickle: str) -> Path:
    """Return the weights file of a scorer that is published as a pickle: the safetensors file that `pisces-rl convert`
    wrote from it if present, else the pickle.

    Args:
        name: that file, a folder, or a Hub id.
        scorer: its name, for messages.
        pickle: its path in a published folder, such as "checkpoint-*/model.pth"; the last match counts. The converted
            file is looked for beside it and in the folder itself.

    Raises ValueError if the folder is neither local nor can be downloaded, or holds neither file.
    """
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    folder = published_folder(name, scorer, ("*.json", pickle))
    converted = Path(pickle).with_suffix(".safetensors")
    found = [file for pattern in (pickle, str(converted), converted.name) for file in folder.glob(pattern)]
    if not found:
        raise ValueError(
            f"model: {folder} holds neither {pickle} nor {converted.name} converted from it, so it does not hold the "
            f"weights of {scorer}."
        )
    return max(found, key=lambda file: (file.parent, file.suffix == converted.suffix))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a pickle with `weights_only`, which can run no code.

    Raises ValueError for a file that is not a pickle of tensors by name.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds, which all mean the same to the user
        raise ValueError(f"model: {path} is not a pickle of tensors alone, and nothing else is read.") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"model: {path} is a pickle, but does not hold tensors by name.")
    return dict(state)


def stored_shapes(folder: Path, scorer: str, files: str = "*.safetensors") -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors in a folder's safetensors files, reading only their headers.

    Raises ValueError if there is no such file.
    """
    found = {}
    for file in sorted(folder.glob(files)):
        with safe_open(file, "pt") as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    if not found:
        raise ValueError(f"model: {folder} holds no {files}, so it does not hold the weights of {scorer}.")
    return found


def check_names(found: Shapes, expected: Shapes, source: str | Path, scorer: str, unused: Sequence[str] = ()) -> None:
    """Check that weights are exactly the expected ones by name and shape, ignoring those that `unused` names: an entry
    that ends with a dot is a prefix of names, any other a suffix.

    Raises ValueError naming up to five that are missing, unknown or of another shape.
    """
    prefixes = tuple(name for name in unused if name.endswith("."))
    suffixes = tuple(name for name in unused if not name.endswith("."))
    found = {k: v for k, v in found.items() if not (k.startswith(prefixes) or k.endswith(suffixes))}
    wrong = [f"{k} is missing" for k in expected if k not in found]
    wrong += [f"{k} is unknown" for k in found if k not in expected]
    wrong += [
        f"{k} has shape {found[k]}, not {shape}" for k, shape in expected.items() if k in found and found[k] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"model: {source} does not hold the weights of {scorer}: {'; '.join(wrong[:5])}{more}.")


def check_config(folder: Path, scorer: str, kind: str, sizes: Mapping[str, int]) -> dict:
    """Return a folder's config.json after checking that its `model_type` is `kind` and that its entries, such as
    "vision_config.hidden_size", are `sizes`. An entry that the file omits is not checked: it has its class's default.

    Raises ValueError that says which model it is instead.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: {folder} has no config.json; pass the folder of {scorer}'s weights.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != kind:
        raise ValueError(f"model: {folder} is a {config.get('model_type')!r}; {scorer} is a {kind!r}.")
    for name, size in sizes.items():
        entry = config
        for part in name.split("."):
            entry = (entry or {}).get(part)
        if entry is not None and entry != size:
            raise ValueError(f"model: {folder} is a different {kind!r}: its {name} is {entry}, {scorer} has {size}.")
    return config


def shapes_of(state: Mapping) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
