"""Encoders by name."""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer

from pisces_rl.assets import asset_path, available
from pisces_rl.rewards.encoders.base import VideoTextEncoder
from pisces_rl.rewards.encoders.tiny_vtm import CARD, TinyVTM

KINDS = ("blip", "clip", "internvideo2", "pe_video", "siglip", "tiny_vtm", "videoprism", "xclip")


def load_encoder(
    name: str | VideoTextEncoder, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32,
    **options,
) -> VideoTextEncoder:  # fmt: skip
    """A frozen encoder, from the name of an embedded one ("tiny-vtm"), a folder, or a Hub id.

    Args:
        device: None: CUDA if there is one. dtype: of its weights. options: of its class, such as `num_frames`.

    Raises ValueError for a model of a kind that is none of the known.
    """
    if isinstance(name, VideoTextEncoder):
        return name if device is None else name.to(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name in available(CARD):
        return TinyVTM.load(asset_path(name, CARD), name=name).to(device, dtype)
    kind = _kind(name)
    if kind not in KINDS:
        raise ValueError(f"encoder {name!r} is a {kind!r}; expected one of {', '.join(KINDS)}.")
    if kind == "tiny_vtm":
        return TinyVTM.load(name).to(device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if kind == "internvideo2":
        from pisces_rl.rewards.encoders.internvideo2 import InternVideo2

        return InternVideo2.load(name, tokenizer, dtype).to(device)
    encoder = _pretrained(kind, name, tokenizer, dtype, options)
    return encoder.eval().requires_grad_(False).to(device)


def _kind(name: str) -> str:
    card = Path(name) / "config.json"
    if card.is_file():
        return json.loads(card.read_text()).get("model_type", "")
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
    if kind != "videoprism":
        options = _pixels(name) | options
    return encoder(model.from_pretrained(name, dtype=dtype), tokenizer, name, **options)


def _pixels(name: str) -> dict:
    """mean and std from a processor's file; empty where it has none."""
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        path = Path(name) / file
        try:
            path = path if Path(name).is_dir() else Path(hf_hub_download(name, file))
            card = json.loads(path.read_text())
        except OSError:
            continue
        if "image_mean" in card:
            return {"mean": tuple(card["image_mean"]), "std": tuple(card["image_std"])}
    return {}
