"""Tiny random pipelines of diffusers, real classes, built offline.

For each family: BUILD makes the pipeline, CALLS holds the arguments of its call, GUIDANCE what switches
classifier-free guidance on and off. FLOW names the families of flow matching, EDM those of EDM's
schedule; the others have cumulative alphas. REFUSES says what a family cannot do, with the message of its PolicyError.
"""

from . import first_seven, second_seven
from .parts import quiet

FAMILIES = (first_seven, second_seven)

BUILD = {name: build for module in FAMILIES for name, build in module.BUILD.items()}
CALLS = {name: call for module in FAMILIES for name, call in module.CALLS.items()}
GUIDANCE = {name: pair for module in FAMILIES for name, pair in module.GUIDANCE.items()}
FLOW = tuple(name for module in FAMILIES for name in module.FLOW)
EDM = second_seven.EDM
REFUSES = second_seven.REFUSES

__all__ = ["BUILD", "CALLS", "EDM", "FLOW", "GUIDANCE", "REFUSES", "quiet"]
