"""Compute advantages from rewards."""

from collections import deque

import torch
from torch import Tensor

#: Values whose difference is at most this share of the largest count as equal: the rounding of a few fp32 operations.
ROUNDING = 4 * torch.finfo(torch.float32).eps


def aggregate_rewards(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum over rewards, (B, n) -> (B,), without rewards that are NaN; NaN if all of them are."""
    total = (values * weights).nansum(1)
    return total.masked_fill(values.isnan().all(1), torch.nan)


def group_advantages(
    values: Tensor,
    weights: Tensor,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return group-relative advantages, A = (r - mean of the group) / (std + 1e-4), computed in fp64.

    Args:
        values: (B, n) rewards, one column per reward, NaN if it does not apply; rows of a group are consecutive.
        weights: (n,) weights of the rewards.
        num_generations: G, rows per group.
        scale_rewards: "group" divides by the standard deviation of the group, "batch" by that of the batch, "none" by
            nothing.
        aggregation: "sum_then_normalize" sums the weighted rewards first. "normalize_then_sum" first normalises each
            reward within its group, so that a reward with a large spread does not drown the others, then the sum over
            the batch (as TRL does).

    Returns:
        (advantages, rewards, group_std): each (B,) fp32. Advantages are exactly 0 if no reward applies. If the rewards
        of a group are equal or differ only by rounding (`ROUNDING`), its advantages and group_std are exactly 0.
    """
    values, weights = values.double(), weights.double()
    groups = values.view(-1, num_generations, values.shape[1])
    by_reward, std_by_reward = deviations(groups, 1)
    # Replace a reward that is equal within a group by its mean, so that its rounding does not drown the others.
    equal = (std_by_reward == 0) & ~groups.isnan()
    settled = torch.where(equal, groups.nanmean(1, True), groups)
    varying = settled.abs().masked_fill(equal, 0.0).view_as(values)
    rewards, settled = aggregate_rewards(values, weights), aggregate_rewards(settled.view_as(values), weights)
    sizes = aggregate_rewards(varying, weights.abs())  # the rounding of a sum is relative to this
    deviation, group_std = deviations(settled.view(-1, num_generations), 1, sizes.view(-1, num_generations))
    group_std = group_std.flatten().repeat_interleave(num_generations)
    if aggregation == "normalize_then_sum":
        total = aggregate_rewards((by_reward / (std_by_reward + 1e-4)).view_as(values), weights)
        advantages = total / (nanstd(total) + 1e-4)  # the mean is already 0, because it is in each group
    else:
        advantages = deviation.flatten()
        if scale_rewards == "group":
            advantages = advantages / (group_std + 1e-4)
        elif scale_rewards == "batch":
            advantages = advantages / (deviations(settled, 0, sizes)[1] + 1e-4)
    return advantages.nan_to_num(0.0).float(), rewards.float(), group_std.float()


def group_correlation(values: Tensor, num_generations: int) -> Tensor:
    """Return the (n, n) correlation of rewards within groups, that is, of their deviations from the group means.

    Args as in `group_advantages`. A pair counts only the rows to which both rewards apply; NaN if one does not vary.
    """
    groups = values.double().view(-1, num_generations, values.shape[1])
    centred = (groups - groups.nanmean(1, keepdim=True)).flatten(0, 1)
    known = (~centred.isnan()).double()
    centred = centred.nan_to_num()
    squares = centred.square().T @ known  # [i, j]: sum of squares of i, over the rows that have both
    squares = squares.masked_fill(squares < 1e-16, torch.nan)
    return centred.T @ centred / (squares * squares.T).sqrt()


def deviations(values: Tensor, dim: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the differences from the mean and the unbiased standard deviation, in fp64, ignoring NaN.

    Both are exactly 0 if the values differ only by rounding, or if fewer than two are not NaN.

    Args:
        values: any shape.
        dim: the dimension to reduce; the standard deviation keeps it with size 1.
        sizes: magnitudes that the rounding is relative to, in the shape of `values`; None: those of `values`.
    """
    values = values.double()
    known = ~values.isnan()
    high = values.masked_fill(~known, -torch.inf).amax(dim, True)
    low = values.masked_fill(~known, torch.inf).amin(dim, True)
    largest = (values if sizes is None else sizes).abs().nan_to_num().amax(dim, True)
    differences = values - values.nanmean(dim, True)
    differences = differences.masked_fill(known & (high - low <= ROUNDING * largest), 0.0)
    count = known.sum(dim, True)
    return differences, (differences.square().nansum(dim, True) / (count - 1).clamp(min=1)).sqrt()


def nanstd(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Return the unbiased standard deviation in the dtype of `values`, computed in fp64, ignoring NaN.

    It is 0 if the values differ only by rounding, or if fewer than two are not NaN.
    """
    if dim is None:
        values, dim = values.flatten(), 0
    std = deviations(values, dim)[1].to(values.dtype)
    return std if keepdim else std.squeeze(dim)


class PromptStatistics:
    """Running mean and standard deviation of each prompt's rewards (DDPO, arXiv 2305.13301, section 4.4).

    A buffer keeps the rewards of each prompt over rollouts. A prompt with fewer than `min_count` rewards uses the
    statistics of the batch.

    Args:
        buffer_size: most recent rewards kept per prompt.
        min_count: rewards that a prompt needs before its statistics are used.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """Add the batch's rewards to the buffers, then return the advantages A = (r - mean) / (std + 1e-4), (B,).

        The standard deviation is the biased one. A is 0 for a NaN reward, and for a reward that differs only by
        rounding from all rewards it is compared with.
        """
        numbers = rewards.double()
        for prompt, reward in zip(prompts, numbers.tolist()):
            if reward == reward:
                self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch = numbers[~numbers.isnan()]
        result = torch.zeros_like(numbers)
        for row, prompt in enumerate(prompts):
            kept = self.buffers.get(prompt, ())
            known = batch if len(kept) < self.min_count else torch.tensor(list(kept), dtype=torch.float64)
            together = torch.cat([known, numbers[row : row + 1]])  # the buffer may have dropped this one already
            if len(known) and bool((deviations(together, 0)[0] != 0).any()):
                result[row] = (numbers[row] - known.mean()) / (known.std(unbiased=False) + 1e-4)
        return result.nan_to_num(0.0).float()

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(values) for prompt, values in self.buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}
