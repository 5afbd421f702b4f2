"""Load rewards by name: optimal-transport rewards with the shipped defaults, the same rewards without OT, published
scorers, functions of this package, and functions in files and modules."""

import importlib
import inspect
import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from safetensors.torch import load_file

from pisces_rl.assets import asset_path
from pisces_rl.ot.maps import TransportMap
from pisces_rl.ot.plans import check_solver
from pisces_rl.rewards.contract import RewardFunc, move
from pisces_rl.rewards.encoders import VideoTextEncoder
from pisces_rl.rewards.encoders.load_encoder import shared_encoder
from pisces_rl.rewards.encoders.tiny_vtm import CARD
from pisces_rl.rewards.functions import load_function
from pisces_rl.rewards.known_names import REWARDS, SCORERS
from pisces_rl.rewards.ot_attention import OTAttention
from pisces_rl.rewards.quality import OTQualityReward
from pisces_rl.rewards.remote_vlm_judge import remote_vlm_judge
from pisces_rl.rewards.retrying_client import masked
from pisces_rl.rewards.semantic import OTSemanticReward
from pisces_rl.rewards.server.remote import remote_reward

DEFAULT_ENCODER = "tiny-vtm"
BANK = "bank.safetensors"
_SCORER_CLASSES = {
    "pickscore": "pickscore:PickScore",
    "aesthetic": "aesthetic_predictor:AestheticPredictor",
    "ocr": "ocr_text:OCRText",
    "video_align": "video_align:VideoAlign",
    "hpsv3": "hpsv3:HPSv3",
    "image_reward": "image_reward:ImageReward",
    "unified_reward": "unified_reward:UnifiedReward",
    "video_score2": "video_score2:VideoScore2",
    "motion_flow": "motion_flow:MotionFlow",
}

_WORLD = "pisces_rl.shapemotion:"  # treated like a user's module: imported by name on first use
FUNCTIONS = {
    f"shapemotion_{score}": f"{_WORLD}shapemotion_{score}"
    for score in ("reward", "correct", "alignment", "quality", "product")
} | {name: f"pisces_rl.rewards.motion:{name}" for name in ("temporal_smoothness", "motion_amount", "exposure")}


def load_reward(
    name: str,
    *,
    encoder: str | Path | VideoTextEncoder = DEFAULT_ENCODER,
    ot_map: str | Path | None = None,
    attention: OTAttention | dict | None = None,
    offload: str | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> RewardFunc:
    """Load a reward by name. Rewards that name the same encoder share it.

    Args:
        name: one of `REWARDS`, optionally with options after a question mark, "video_align?video_fps=8&weights=1,0,1",
            which override the keyword arguments; or one of `FUNCTIONS`, file.py:function, package.module:function,
            http://host:port/NAME of a server (`server.remote.remote_reward`), or vlm+http://host:port/v1?model=ID of a
            vision-language judge (`remote_vlm_judge`), none of which take options here. "ot_quality" is the cosine
            under a map; `divergence_weight` adds the credit of the divergence to the bank stored with the map.
        encoder: the name of an embedded encoder, a folder, a Hub id, or an encoder; only for `ENCODER_REWARDS`.
        ot_map: for "ot_quality", a folder written by `examples/fit_ot_map.py`; default: the one shipped for tiny-vtm.
        attention: for "ot_semantic", an `OTAttention` or its arguments; default: `OTAttention()`.
        offload: the device, such as "cuda", on which the encoder computes while its weights stay on the CPU between
            calls; default: it stays on its device. A call that leaves a graph leaves the weights on the device.
        device: where the reward computes, for instance "cuda:1"; default: CUDA if available.
        options: for `OTQualityReward` or `OTSemanticReward` (`solver="geomloss"`), or for the class of a scorer.

    Raises:
        ValueError: the name is unknown, the reward does not use an option, the map belongs to another encoder, or a
            scorer's weights or package are missing.
    """
    if is_known(name) and "?" in name:
        given = {"encoder": encoder, "ot_map": ot_map, "attention": attention, "offload": offload, "device": device}
        name, behind = split_options(name)
        return load_reward(name, **given | options | behind)
    if name in SCORERS:
        given = {"encoder": None if encoder == DEFAULT_ENCODER else encoder, "ot_map": ot_map, "attention": attention}
        options |= {option: value for option, value in (given | {"offload": offload}).items() if value is not None}
        kind = _scorer(name)
        _check_used(name, kind, list(options), {"name"})
        if device is not None and "device" in inspect.signature(kind).parameters:
            options.setdefault("device", device)
        return kind(name=name, **options)
    if name not in REWARDS:
        function: RewardFunc
        if name.startswith(("http://", "https://")):
            function = remote_reward(name)
        elif name.startswith(("vlm+http://", "vlm+https://")):
            function = remote_vlm_judge(name)
        else:
            function = load_function(FUNCTIONS.get(name, name), [*REWARDS, *FUNCTIONS])
        if options or (encoder, ot_map, attention, offload) != (DEFAULT_ENCODER, None, None, None):
            raise ValueError(f"reward {masked(name)!r} is a function: it takes no options; {', '.join(REWARDS)} do.")
        return _moved(function, device)
    parts = {"ot_map": ot_map, "attention": attention}
    without = {"cosine": ("ot_map",), "matching": ("attention", "solver")}.get(name, ())
    left_out = {"encoder", "matcher", "name", *without}
    _check_used(name, _kind(name), [*options, *(part for part, value in parts.items() if value is not None)], left_out)
    if options.get("solver") is not None:
        check_solver(options["solver"])
    if isinstance(encoder, VideoTextEncoder) and offload is not None:
        raise ValueError(f"offload: set it on the encoder itself: encoder.offload = {offload!r}.")
    if name == "ot_semantic":
        options["attention"] = attention if isinstance(attention, OTAttention) else OTAttention(**(attention or {}))
    if name == "ot_quality":
        folder = asset_path(DEFAULT_ENCODER, CARD) / "map" if ot_map is None else Path(ot_map)
        options["ot_map"] = TransportMap.load(folder)
        if options.get("divergence_weight") and "bank" not in options:
            options["bank"] = load_file(folder / BANK)["bank"].float()
    model = shared_encoder(encoder, offload, device)
    if name == "ot_quality" and ot_map is None and options["ot_map"].encoder != model.name:
        raise ValueError(
            f"ot_map: no map is shipped for {model.name}, only for {options['ot_map'].encoder}; fit one with "
            "examples/fit_ot_map.py."
        )
    return _moved(_kind(name)(model, name=name, **options), device)


def is_known(name: str) -> bool:
    """Return whether `name` is one of `REWARDS`, with or without options after it."""
    return name.partition("?")[0] in REWARDS


def split_options(name: str) -> tuple[str, dict]:
    """Split a name into the reward and its options. An option gets the type of its default; if the default is None,
    text that reads as a number becomes one. Commas make lists."""
    name, _, query = name.partition("?")
    try:
        options = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True))
    except ValueError as error:
        raise ValueError(f"reward {name!r}: expected {name}?option=value&option=value, got {query!r}.") from error
    kind = _scorer(name) if name in SCORERS else _kind(name)
    defaults = {option: parameter.default for option, parameter in inspect.signature(kind).parameters.items()}
    for option, text in options.items():
        default = defaults.get(option)
        value = text if isinstance(default, (str, Path)) else _read(text)
        fine = {
            int: type(value) is int,
            float: type(value) in (int, float),
            tuple: isinstance(value, list) and all(type(number) in (int, float) for number in value),
        }
        if not fine.get(type(default), True):
            raise ValueError(f"reward {name!r}: {option}={text!r} must have the type of its default, {default!r}.")
        options[option] = value
    return name, options


def _read(text: str) -> Any:
    """Parse a number, a JSON object (arguments of `OTAttention`) or a comma-separated list, else return the text."""
    for read in (json.loads if text.startswith("{") else int, float):
        try:
            value = read(text)
        except ValueError:
            continue
        return text if isinstance(value, float) and not math.isfinite(value) else value
    return [_read(part) for part in text.split(",")] if "," in text else text


def _moved(reward: RewardFunc, device: torch.device | str | None) -> RewardFunc:
    if device is not None:
        move(reward, device)
    return reward


def _kind(name: str) -> type[OTQualityReward] | type[OTSemanticReward]:
    return OTQualityReward if name in ("ot_quality", "cosine") else OTSemanticReward


def _scorer(name: str) -> type:
    """Import the class of one of `SCORERS` on first use: some scorers need extra packages."""
    module, _, kind = _SCORER_CLASSES[name].partition(":")
    return getattr(importlib.import_module(f"pisces_rl.rewards.scorers.{module}"), kind)


def _check_used(name: str, kind: type, given: list[str], left_out: set[str]) -> None:
    """Raise a ValueError if the reward does not use one of the given options."""
    takes = [option for option in inspect.signature(kind).parameters if option not in left_out]
    unused = sorted(set(given) - set(takes))
    if unused:
        raise ValueError(f"reward {name!r} does not use {', '.join(unused)}; it takes {', '.join(takes)}.")
