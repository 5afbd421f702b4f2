"""Load encoders by name."""

import functools
import inspect
import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer

from pisces_rl.assets import asset_path, available
from pisces_rl.rewards.encoders.encoder import VideoTextEncoder, digest
from pisces_rl.rewards.encoders.tiny_vtm import CARD, TinyVTM

KINDS = ("blip", "clip", "internvideo2", "pe_video", "siglip", "tiny_vtm", "videoprism", "xclip")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
#: Files that an encoder reads from a folder besides its weights.
DESCRIPTIONS = (
    "config.json",
    *PROCESSORS,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


def load_encoder(
    name: str | VideoTextEncoder,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> VideoTextEncoder:
    """Load a frozen encoder from the name of an embedded one ("tiny-vtm"), a folder, or a Hub id.

    The encoder's `name`, to which maps are bound, is the given name, "@", and the commit of a Hub model or else the
    hash of the files it reads (for tiny-vtm and InternVideo2: of the weights), plus options that differ from the
    defaults.

    Args:
        name: as above; or an encoder, which is only moved and cast.
        device: None: CUDA if available.
        dtype: of its weights; None: fp32.
        options: for its class, such as `num_frames`.

    Raises ValueError for an unknown kind of model, and for options that its class does not accept.
    """
    if isinstance(name, VideoTextEncoder):
        _check_options(name.name, options, {})
        return name.to(device, dtype)
    device, dtype = device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype or torch.float32
    kind = "tiny_vtm" if name in available(CARD) else _kind(name)
    if kind not in KINDS:
        raise ValueError(f"encoder {name!r} is a {kind!r}; expected one of {', '.join(KINDS)}.")
    if kind in ("tiny_vtm", "internvideo2"):
        _check_options(name, options, {})
    if kind == "tiny_vtm":
        return TinyVTM.load(asset_path(name, CARD) if name in available(CARD) else name).to(device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if kind == "internvideo2":
        from pisces_rl.rewards.encoders.internvideo2 import InternVideo2

        return InternVideo2.load(name, tokenizer, dtype).to(device)
    encoder = _pretrained(kind, name, tokenizer, dtype, options)
    return encoder.eval().requires_grad_(False).to(device)


def shared_encoder(
    encoder: str | Path | VideoTextEncoder,
    offload: str | torch.device | None = None,
    device: str | torch.device | None = None,
) -> VideoTextEncoder:
    """Call `load_encoder`, but return the same encoder each time while the files in its folder are unchanged. An
    encoder object is returned as it is. With `offload`, the encoder computes on that device and its weights stay on
    the CPU between uses."""
    if isinstance(encoder, VideoTextEncoder):
        return encoder
    if not isinstance(encoder, (str, Path)):
        raise TypeError(f"encoder: expected a VideoTextEncoder, a name, a folder or a Hub id, got {encoder!r}.")
    stamps = tuple((file.name, file.stat().st_mtime_ns) for file in _files(Path(encoder)))
    return _shared(str(encoder), offload, device, stamps)


@functools.lru_cache(maxsize=4)
def _shared(
    name: str, offload: str | torch.device | None, device: str | torch.device | None, stamps: tuple
) -> VideoTextEncoder:
    if offload is None:
        return load_encoder(name, device=device)
    encoder = load_encoder(name, device="cpu")
    encoder.offload = offload
    return encoder


def _check_options(name: str, options: dict, known: dict) -> None:
    """Raise a ValueError for options that are not among the known ones."""
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{', '.join(unknown)}: encoder {name!r} takes {', '.join(known) or 'no options'}.")


def _kind(name: str) -> str:
    card = Path(name) / "config.json"
    if card.is_file():
        return json.loads(card.read_text(encoding="utf-8")).get("model_type", "")
    return AutoConfig.from_pretrained(name).model_type


def _pretrained(kind: str, name: str, tokenizer, dtype: torch.dtype, options: dict) -> VideoTextEncoder:
    import transformers

    from pisces_rl.rewards.encoders.blip import BlipEncoder
    from pisces_rl.rewards.encoders.frames import FrameEncoder
    from pisces_rl.rewards.encoders.pe_video import PEVideoEncoder
    from pisces_rl.rewards.encoders.videoprism import VideoPrismEncoder
    from pisces_rl.rewards.encoders.xclip import XCLIPEncoder

    encoder, model = {
        "blip": (BlipEncoder, transformers.BlipForImageTextRetrieval),
        "clip": (FrameEncoder, transformers.CLIPModel),
        "pe_video": (PEVideoEncoder, transformers.PeVideoModel),
        "siglip": (FrameEncoder, transformers.SiglipModel),
        "videoprism": (VideoPrismEncoder, transformers.VideoPrismClipModel),
        "xclip": (XCLIPEncoder, transformers.XCLIPModel),
    }[kind]
    usual = {p.name: p.default for p in inspect.signature(encoder).parameters.values() if p.kind is p.KEYWORD_ONLY}
    _check_options(name, options, usual)
    if "mean" in usual:
        usual |= _pixels(name)
    own = "".join(f" {k}={v}" for k, v in sorted(options.items()) if v != usual[k])
    return encoder(model.from_pretrained(name, dtype=dtype), tokenizer, _versioned_name(name) + own, **usual | options)


def _versioned_name(name: str) -> str:
    """Return a name with the Hub's commit, or the hash of a folder's weights, sizes, tokenizer and processor."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{Path(hf_hub_download(name, 'config.json')).parent.name[:12]}"  # .../snapshots/commit/
    return f"{folder.resolve().name}@{digest(*_files(folder))}"


def _files(folder: Path) -> list[Path]:
    """Return the files that an encoder reads; none if the folder does not exist."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [*weights, *(folder / file for file in DESCRIPTIONS if (folder / file).is_file())]


def _pixels(name: str) -> dict:
    """Read mean and std from a processor's file; return {} if there is none."""
    for file in PROCESSORS:
        path = Path(name) / file
        try:
            path = path if Path(name).is_dir() else Path(hf_hub_download(name, file))
            card = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            continue
        card = card.get("image_processor") or card.get("video_processor") or card
        if "image_mean" in card:
            return {"mean": tuple(card["image_mean"]), "std": tuple(card["image_std"])}
    return {}
