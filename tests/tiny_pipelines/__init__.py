"""Tiny random diffusers pipelines: real classes, built offline from families.yaml.

Each name below maps a family to what its entry in families.yaml says. BUILD holds the function that builds the
pipeline, CALLS the arguments of its call, GUIDANCE the arguments that switch classifier-free guidance on and off, and
CONDITIONS what each of two videos is conditioned on besides its prompt. FLOW and EDM list the families with that
schedule; the others have cumulative alphas. EXPERTS and REFUSES are as in the file.

To add a family, write its entry in families.yaml; a part that needs code is a function in parts.py.
"""

from copy import deepcopy
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
import yaml

from . import parts
from .parts import byte_tokenizer, picture, quiet

FAMILIES = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text(encoding="utf-8"))["families"]


def find_class(name: str):
    """Return the class or function of this name from parts.py, diffusers or transformers, or at its import path."""
    if "." in name:
        module, name = name.rsplit(".", 1)
        return getattr(import_module(module), name)
    return next(getattr(module, name) for module in (parts, diffusers, transformers) if hasattr(module, name))


def make(value):
    """Build what families.yaml describes: an object if `value` is a mapping with a class, else the value itself."""
    if not isinstance(value, dict) or "class" not in value:
        return value
    made = find_class(value["class"])
    arguments = {name: make(argument) for name, argument in value.items() if name != "class"}
    if isinstance(made, type) and issubclass(made, transformers.PreTrainedModel):
        return made(made.config_class(**arguments)).eval()
    return made(**arguments)


def build(family: str, seed: int = 0, **changes):
    """Build the pipeline of a family.

    Args:
        family: its name in families.yaml.
        seed: the seed of its weights.
        changes: arguments to change, by component, e.g. `transformer=dict(num_layers=1)`.
    """
    spec = deepcopy(FAMILIES[family])
    for component, change in changes.items():
        spec["pipeline"][component] |= change
    parts_of_base = build(spec["base"], seed).components if "base" in spec else {}
    torch.manual_seed(seed)
    pipe = make(spec["pipeline"] | parts_of_base | spec["pipeline"])  # in this order the weights are drawn
    for path, value in spec.get("attributes", {}).items():
        *owner, name = path.rsplit(".", 1)
        setattr(attrgetter(*owner)(pipe) if owner else pipe, name, value)
    return pipe


def guidance(spec: dict) -> tuple[dict, dict]:
    """Return the call arguments that switch guidance on and those that switch it off."""
    on, off = spec.get("guidance", ({"guidance_scale": spec["call"].get("guidance_scale")}, {"guidance_scale": 1.0}))
    return on, off


BUILD = {family: partial(build, family) for family in FAMILIES}
CALLS = {family: spec["call"] for family, spec in FAMILIES.items()}
GUIDANCE = {family: guidance(spec) for family, spec in FAMILIES.items()}
IMAGES = {"image": [picture(0), picture(1)]}
CONDITIONS = {family: IMAGES if spec.get("images") else {} for family, spec in FAMILIES.items()}
FLOW = tuple(family for family, spec in FAMILIES.items() if spec.get("schedule") == "flow")
EDM = tuple(family for family, spec in FAMILIES.items() if spec.get("schedule") == "edm")
EXPERTS = {family: tuple(spec["experts"]) for family, spec in FAMILIES.items() if "experts" in spec}
REFUSES = {(family, what): why for family, spec in FAMILIES.items() for what, why in spec.get("refuses", {}).items()}
# One of each schedule and prediction, one with an image condition, one with two experts, one that decodes by frame.
OFTEN = ("wan", "mochi", "cogvideox", "cosmos", "latte", "easyanimate", "wan_i2v", "wan22_a14b")


def often(families) -> list:
    """Return the families as test parameters; all that are not in OFTEN are marked slow."""
    return [family if family in OFTEN else pytest.param(family, marks=pytest.mark.slow) for family in families]


__all__ = ["BUILD", "CALLS", "CONDITIONS", "EDM", "EXPERTS", "FLOW", "GUIDANCE", "OFTEN", "REFUSES", "often"]
__all__ += ["byte_tokenizer", "picture", "quiet"]
