"""Transition kernels p(x' | x, prediction): pure functions that give (mean, std), and the Gaussian log-density.

What: one function a kernel. Why: rollout and update call the same function, so that they cannot differ.
How: `TRANSITIONS["flow_sde"].kernel(x, v, sigma, sigma_next, noise_level=0.7, ...)`. Gotcha: `noise_level` means a
for `flow_sde` and `cps`, eta for `dance_sde`, `ddim` and `ancestral`; each has its own default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .ancestral import ancestral
from .cps import cps
from .ddim import ddim
from .flow import dance_sde, flow_sde, flow_sde_linear
from .gaussian import log_prob


@dataclass(frozen=True)
class Transition:
    """A kernel, the family of schedules it fits, and the noise level its authors use."""

    kernel: Callable
    family: Literal["flow", "ddim", "edm"]
    noise_level: float


TRANSITIONS: dict[str, Transition] = {
    "flow_sde": Transition(flow_sde, "flow", 0.7),
    "flow_sde_linear": Transition(flow_sde_linear, "flow", 1.0),
    "dance_sde": Transition(dance_sde, "flow", 0.3),
    "cps": Transition(cps, "flow", 0.8),
    "ddim": Transition(ddim, "ddim", 1.0),
    "ancestral": Transition(ancestral, "edm", 1.0),
}

__all__ = [
    "TRANSITIONS", "Transition", "ancestral", "cps", "dance_sde", "ddim", "flow_sde", "flow_sde_linear", "log_prob",
]
