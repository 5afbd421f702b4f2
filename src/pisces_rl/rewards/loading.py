"""The optimal-transport rewards by name, with what is shipped as their defaults, and the same rewards without OT."""

import difflib
import functools
from pathlib import Path

from safetensors.torch import load_file

from pisces_rl.assets import asset_path
from pisces_rl.ot.maps import TransportMap
from pisces_rl.rewards.encoders import VideoTextEncoder, load_encoder
from pisces_rl.rewards.encoders.tiny_vtm import CARD
from pisces_rl.rewards.ot_attention import OTAttention
from pisces_rl.rewards.quality import OTQualityReward
from pisces_rl.rewards.semantic import OTSemanticReward

DEFAULT_ENCODER = "tiny-vtm"
BANK = "bank.safetensors"
REWARDS = {
    "ot_quality": "cosine of the video with its text's image under a transport map",
    "ot_semantic": "matching probability with attention fused with transport plans",
    "cosine": "ot_quality without a map",
    "matching": "ot_semantic without plans",
}


def load_reward(
    name: str, *, encoder: str | VideoTextEncoder = DEFAULT_ENCODER, ot_map: str | Path | None = None,
    attention: OTAttention | dict | None = None, **options,
) -> OTQualityReward | OTSemanticReward:  # fmt: skip
    """A reward by name; rewards of one encoder's name share one encoder.

    Args:
        name: one of `REWARDS`. "ot_quality" is the published cosine; a `divergence_weight` adds the credit of the
            divergence to the bank that lies with the map.
        encoder: the name of an embedded encoder, a folder or a Hub id, or an encoder.
        ot_map: folder that `examples/fit_ot_map.py` wrote; unset: the one shipped for tiny-vtm.
        attention: of "ot_semantic", or its arguments; unset: `OTAttention()`.
        options: of `OTQualityReward` or `OTSemanticReward`.
    """
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"reward {name!r} is unknown; did you mean {nearest!r}? Known: {', '.join(REWARDS)}.")
    model = encoder if isinstance(encoder, VideoTextEncoder) else _encoder(str(encoder))
    options = {"name": name} | options
    if name in ("ot_semantic", "matching"):
        if isinstance(attention, dict):
            attention = OTAttention(**attention)
        return OTSemanticReward(model, (attention or OTAttention()) if name == "ot_semantic" else None, **options)
    if name == "cosine":
        return OTQualityReward(model, **options)
    if ot_map is None and encoder != DEFAULT_ENCODER:
        raise ValueError(f"ot_map: none is shipped for {model.name}; fit one with examples/fit_ot_map.py.")
    folder = asset_path(DEFAULT_ENCODER, CARD) / "map" if ot_map is None else Path(ot_map)
    if options.get("divergence_weight") and "bank" not in options:
        options["bank"] = load_file(folder / BANK)["bank"].float()
    return OTQualityReward(model, TransportMap.load(folder, encoder=model.name), **options)


@functools.lru_cache(maxsize=4)
def _encoder(name: str) -> VideoTextEncoder:
    return load_encoder(name)
