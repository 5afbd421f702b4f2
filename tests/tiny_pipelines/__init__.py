"""Tiny random pipelines of diffusers, real classes, built offline.

For each family: BUILD makes the pipeline, CALLS holds the arguments of its call, GUIDANCE what switches
classifier-free guidance on and off. FLOW names the families of flow matching, EXPERTS the denoiser that each of 3
steps calls, where there are several.
"""

from . import first_seven, since_wan22
from .parts import quiet

FAMILIES = (first_seven, since_wan22)

BUILD = {name: build for module in FAMILIES for name, build in module.BUILD.items()}
CALLS = {name: call for module in FAMILIES for name, call in module.CALLS.items()}
GUIDANCE = {name: pair for module in FAMILIES for name, pair in module.GUIDANCE.items()}
FLOW = tuple(name for module in FAMILIES for name in module.FLOW)
EXPERTS = since_wan22.EXPERTS

__all__ = ["BUILD", "CALLS", "EXPERTS", "FLOW", "GUIDANCE", "quiet"]
