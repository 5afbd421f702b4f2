"""Tiny random pipelines of diffusers, real classes, built offline.

For each family: BUILD makes the pipeline, CALLS holds the arguments of its call, GUIDANCE what switches
classifier-free guidance on and off, CONDITIONS what each of two videos is conditioned on besides its prompt. FLOW
names the families of flow matching, EDM those of EDM's schedule; the others have cumulative alphas. EXPERTS names the
denoiser that each of 3 steps calls, where there are several. REFUSES says what a family cannot do, with the message of
its PolicyError. `often` is for what concerns every family and is quick for one of each schedule.
"""

import pytest

from . import first_seven, image_to_video, second_seven, since_wan22, text_to_image
from .parts import quiet

FAMILIES = (first_seven, since_wan22, second_seven, image_to_video, text_to_image)

BUILD = {name: build for module in FAMILIES for name, build in module.BUILD.items()}
CALLS = {name: call for module in FAMILIES for name, call in module.CALLS.items()}
GUIDANCE = {name: pair for module in FAMILIES for name, pair in module.GUIDANCE.items()}
FLOW = tuple(name for module in FAMILIES for name in module.FLOW)
CONDITIONS = dict.fromkeys(BUILD, {}) | image_to_video.CONDITIONS
EDM = second_seven.EDM
EXPERTS = since_wan22.EXPERTS
REFUSES = second_seven.REFUSES
# One of each schedule and prediction, of an image as condition, of two experts, and of a decoder frame by frame.
OFTEN = ("wan", "mochi", "cogvideox", "cosmos", "latte", "easyanimate", "wan_i2v", "wan22_a14b")


def often(families) -> list:
    """These families as parameters of a test, which is slow for all but those of OFTEN."""
    return [family if family in OFTEN else pytest.param(family, marks=pytest.mark.slow) for family in families]


__all__ = ["BUILD", "CALLS", "CONDITIONS", "EDM", "EXPERTS", "FLOW", "GUIDANCE", "OFTEN", "REFUSES", "often", "quiet"]
