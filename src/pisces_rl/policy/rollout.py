"""The record of a policy's samples: what it takes to score them again or to add new noise to them, and no more."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Rollout:
    """B videos: sampled, with the states of their trained denoising steps, or given as latents.

    Attributes:
        prompts: B prompts.
        noise_seeds: B seeds of the start noise, which the pipeline draws again at replay.
        videos: (B, F, 3, H, W) fp32 in [0, 1]; None if they were not decoded.
        steps: indices of the K trained denoising steps, ascending.
        states: {i: (B * rows_per_video, ...)} latents in the pipeline's layout, fp32, for every trained step i and
            the state after it, i + 1.
        means: {i: as states} mean of each trained transition under the sampling policy.
        log_probs: (B, K) fp32, log p of each trained transition under the sampling policy.
        rows_per_video: rows of `states` that belong to one video.
        followed: {(k, i): (B * n, ...)} fp32 state, before trained step i, of what the pipeline denoises with its
            k-th copy of the scheduler (LTX-2's audio). It follows the ODE, but depends on the videos' states.
        conditions: {argument of the pipeline's call: B values} that each video is conditioned on besides its prompt.
        clean: (B * rows_per_video, ...) fp32 latents after the last step, before decoding.
    """

    prompts: list[str]
    noise_seeds: list[int]
    videos: Tensor | None
    steps: list[int]
    states: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    log_probs: Tensor | None = None
    rows_per_video: int = 1
    followed: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    conditions: dict[str, list] = field(default_factory=dict)
    clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def state_rows(self, rows: Sequence[int]) -> list[int]:
        """Return the rows of `states` and `means` that belong to the videos `rows`."""
        n = self.rows_per_video
        return [row * n + k for row in rows for k in range(n)]

    def mean_rows(self, index: int, rows: Sequence[int]) -> Tensor:
        """Return the rows of `means[index]` that belong to the videos `rows`."""
        return self.means[index][self.state_rows(rows)]

    def clean_rows(self, rows: Sequence[int]) -> Tensor:
        """Return the rows of `clean` that belong to the videos `rows`."""
        if self.clean is None:
            raise ValueError("this Rollout has no clean latents; set `clean`, or predict from a `state`.")
        return self.clean.unflatten(0, (len(self), -1))[list(rows)].flatten(0, 1)

    def followed_rows(self, key: tuple[int, int], rows: Sequence[int]) -> Tensor:
        """Return the rows of `followed[key]` that belong to the videos `rows`."""
        return self.followed[key].unflatten(0, (len(self), -1))[list(rows)].flatten(0, 1)

    @staticmethod
    def cat(rollouts: Sequence["Rollout"]) -> "Rollout":
        """Join rollouts into one, in order; all must have the same trained steps and conditions."""
        first = rollouts[0]
        if any(r.steps != first.steps for r in rollouts):
            raise ValueError(f"rollouts with different steps cannot be joined: {[r.steps for r in rollouts]}.")
        if any(r.conditions.keys() != first.conditions.keys() for r in rollouts):
            names = [sorted(r.conditions) for r in rollouts]
            raise ValueError(f"rollouts with different conditions cannot be joined: {names}.")
        if len(rollouts) == 1:
            return first
        return Rollout(
            prompts=[p for r in rollouts for p in r.prompts],
            noise_seeds=[s for r in rollouts for s in r.noise_seeds],
            videos=None if first.videos is None else torch.cat([r.videos for r in rollouts]),
            steps=first.steps,
            states={i: torch.cat([r.states[i] for r in rollouts]) for i in first.states},
            means={i: torch.cat([r.means[i] for r in rollouts]) for i in first.means},
            log_probs=None if first.log_probs is None else torch.cat([r.log_probs for r in rollouts]),
            rows_per_video=first.rows_per_video,
            followed={key: torch.cat([r.followed[key] for r in rollouts]) for key in first.followed},
            conditions={name: [v for r in rollouts for v in r.conditions[name]] for name in first.conditions},
            clean=None if first.clean is None else torch.cat([r.clean for r in rollouts]),
        )
