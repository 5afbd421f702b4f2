"""From rewards to advantages."""

from collections import deque

import torch
from torch import Tensor


def aggregate_rewards(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over rewards, (B, n) -> (B,); rewards that do not apply (NaN) are left out, NaN if none applies."""
    total = (values * weights).nansum(1)
    return total.masked_fill(values.isnan().all(1), torch.nan)


def group_advantages(values: Tensor, weights: Tensor, num_generations: int, *, scale_rewards: str = "group",
                     aggregation: str = "sum_then_normalize") -> tuple[Tensor, Tensor, Tensor]:
    """Group-relative advantages, A = (r - mean of the group) / (std + 1e-4).

    Args:
        values: (B, n) one column a reward, NaN where it does not apply; rows of a group are consecutive.
        weights: (n,).
        num_generations: rows a group, G.
        scale_rewards: "group" divides by the group's standard deviation, "batch" by the batch's, "none" by nothing.
        aggregation: "sum_then_normalize" sums the weighted rewards first; "normalize_then_sum" normalises every
            reward within its group first, so that an easy reward does not starve a hard one, and the sum over the
            batch afterwards (as TRL does).

    Returns:
        (advantages, rewards, group_std): each (B,); advantages are 0 where no reward applies.
    """
    rewards = aggregate_rewards(values, weights)
    grouped = rewards.view(-1, num_generations)
    group_std = nanstd(grouped, dim=1).repeat_interleave(num_generations)
    if aggregation == "normalize_then_sum":
        by_group = values.view(-1, num_generations, values.shape[1])
        scaled = (by_group - by_group.nanmean(1, keepdim=True)) / (nanstd(by_group, dim=1, keepdim=True) + 1e-4)
        total = aggregate_rewards(scaled.view_as(values), weights)
        advantages = (total - total.nanmean()) / (nanstd(total) + 1e-4)
    else:
        advantages = rewards - grouped.nanmean(1).repeat_interleave(num_generations)
        if scale_rewards == "group":
            advantages = advantages / (group_std + 1e-4)
        elif scale_rewards == "batch":
            advantages = advantages / (nanstd(rewards) + 1e-4)
    return advantages.nan_to_num(0.0), rewards, group_std


def group_correlation(values: Tensor, num_generations: int) -> Tensor:
    """(n, n) correlation of rewards within groups: of what each value differs by from its group's mean.

    Args as in `group_advantages`. A pair counts the rows to which both rewards apply; NaN where one does not vary.
    """
    groups = values.double().view(-1, num_generations, values.shape[1])
    centred = (groups - groups.nanmean(1, keepdim=True)).flatten(0, 1)
    known = (~centred.isnan()).double()
    centred = centred.nan_to_num()
    squares = centred.square().T @ known  # [i, j]: of i, over the rows of both
    squares = squares.masked_fill(squares < 1e-16, torch.nan)
    return centred.T @ centred / (squares * squares.T).sqrt()


def nanstd(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Unbiased standard deviation that leaves NaN out; 0 where fewer than two values are left."""
    if dim is None:
        values, dim = values.flatten(), 0
    mean = values.nanmean(dim, keepdim=True)
    count = (~values.isnan()).sum(dim, keepdim=keepdim)
    variance = (values - mean).square().nansum(dim, keepdim=keepdim) / (count - 1).clamp(min=1)
    return variance.sqrt()


class PromptStatistics:
    """Running mean and standard deviation of each prompt's rewards (DDPO, arXiv 2305.13301, section 4.4).

    Rewards of one prompt are kept over rollouts in a buffer; a prompt seen fewer than `min_count` times takes the
    batch's statistics.

    Args:
        buffer_size: rewards kept a prompt. min_count: rewards needed before a prompt stands on its own.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """(B,) A = (r - mean) / (std + 1e-4), after the batch's rewards have entered the buffers; NaN gives 0."""
        for prompt, reward in zip(prompts, rewards.tolist()):
            if reward == reward:
                self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch = rewards[~rewards.isnan()]
        result = torch.zeros_like(rewards)
        for row, prompt in enumerate(prompts):
            kept = self.buffers.get(prompt, ())
            known = batch if len(kept) < self.min_count else torch.tensor(list(kept), dtype=rewards.dtype)
            if len(known):
                result[row] = (rewards[row] - known.mean()) / (known.std(unbiased=False) + 1e-4)
        return result.nan_to_num(0.0)

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(values) for prompt, values in self.buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}
