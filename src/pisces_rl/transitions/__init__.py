"""Transition kernels p(x' | x, prediction): pure functions that return (mean, std), and the Gaussian log-density.

What: one function per kernel. Why: rollout and update call the same function, so they cannot differ.
How: `TRANSITIONS["flow_sde"].kernel(x, v, sigma, sigma_next, noise_level=0.7, ...)`. Gotcha: `noise_level` means a
for `flow_sde` and `cps`, eta for `dance_sde`, `ddim` and `ancestral`; each kernel has its own default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .ancestral import ancestral
from .cps import cps
from .ddim import ddim
from .flow import dance_sde, flow_sde, flow_sde_linear
from .gaussian import log_prob


class Paper(NamedTuple):
    """A source that model cards cite."""

    arxiv: str
    title: str


@dataclass(frozen=True)
class Transition:
    """A kernel, the schedule family it fits, its authors' noise level, and the papers it comes from."""

    kernel: Callable
    family: Literal["flow", "ddim", "edm"]
    noise_level: float
    papers: tuple[Paper, ...]


FLOW_GRPO = Paper("2505.05470", "Flow-GRPO: Training Flow Matching Models via Online RL")
DANCE_GRPO = Paper("2505.07818", "DanceGRPO: Unleashing GRPO on Visual Generation")
FLOW_CPS = Paper("2509.05952", "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching")
DDIM = Paper("2010.02502", "Denoising Diffusion Implicit Models")
DDPO = Paper("2305.13301", "Training Diffusion Models with Reinforcement Learning")
EDM = Paper("2206.00364", "Elucidating the Design Space of Diffusion-Based Generative Models")

TRANSITIONS: dict[str, Transition] = {
    "flow_sde": Transition(flow_sde, "flow", 0.7, (FLOW_GRPO,)),
    "flow_sde_linear": Transition(flow_sde_linear, "flow", 1.0, (FLOW_GRPO,)),
    "dance_sde": Transition(dance_sde, "flow", 0.3, (DANCE_GRPO,)),
    "cps": Transition(cps, "flow", 0.8, (FLOW_CPS,)),
    "ddim": Transition(ddim, "ddim", 1.0, (DDIM, DDPO)),
    "ancestral": Transition(ancestral, "edm", 1.0, (EDM,)),
}

__all__ = [
    "TRANSITIONS",
    "Paper",
    "Transition",
    "ancestral",
    "cps",
    "dance_sde",
    "ddim",
    "flow_sde",
    "flow_sde_linear",
    "log_prob",
]
