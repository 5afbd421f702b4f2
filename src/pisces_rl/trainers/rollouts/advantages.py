"""From rewards to advantages."""

from collections import deque

import torch
from torch import Tensor

#: Values that differ by less than this share of the largest are equal: the rounding of a few fp32 operations.
ROUNDING = 4 * torch.finfo(torch.float32).eps


def aggregate_rewards(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over rewards, (B, n) -> (B,); rewards that do not apply (NaN) are left out, NaN if none applies."""
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
    """Group-relative advantages, A = (r - mean of the group) / (std + 1e-4), computed in fp64.

    Args:
        values: (B, n) one column a reward, NaN where it does not apply; rows of a group are consecutive.
        weights: (n,).
        num_generations: rows a group, G.
        scale_rewards: "group" divides by the group's standard deviation, "batch" by the batch's, "none" by nothing.
        aggregation: "sum_then_normalize" sums the weighted rewards first; "normalize_then_sum" normalises every
            reward within its group first, so that an easy reward does not starve a hard one, and the sum over the
            batch afterwards (as TRL does).

    Returns:
        (advantages, rewards, group_std): each (B,) fp32; advantages are exactly 0 where no reward applies, and in a
        group whose rewards are equal or differ only by rounding (`ROUNDING`), where group_std is 0, too.
    """
    values, weights = values.double(), weights.double()
    groups = values.view(-1, num_generations, values.shape[1])
    by_reward, std_by_reward = deviations(groups, 1)
    # A reward that is equal in a group stands at its mean, so that its rounding does not drown the others.
    equal = (std_by_reward == 0) & ~groups.isnan()
    settled = torch.where(equal, groups.nanmean(1, True), groups)
    varying = settled.abs().masked_fill(equal, 0.0).view_as(values)
    rewards, settled = aggregate_rewards(values, weights), aggregate_rewards(settled.view_as(values), weights)
    sizes = aggregate_rewards(varying, weights.abs())  # what the rounding of a sum is relative to
    deviation, group_std = deviations(settled.view(-1, num_generations), 1, sizes.view(-1, num_generations))
    group_std = group_std.flatten().repeat_interleave(num_generations)
    if aggregation == "normalize_then_sum":
        total = aggregate_rewards((by_reward / (std_by_reward + 1e-4)).view_as(values), weights)
        advantages = total / (nanstd(total) + 1e-4)  # their mean is 0, as it is in each group
    else:
        advantages = deviation.flatten()
        if scale_rewards == "group":
            advantages = advantages / (group_std + 1e-4)
        elif scale_rewards == "batch":
            advantages = advantages / (deviations(settled, 0, sizes)[1] + 1e-4)
    return advantages.nan_to_num(0.0).float(), rewards.float(), group_std.float()


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


def deviations(values: Tensor, dim: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Differences from the mean, and the unbiased standard deviation (with the dimension kept), in fp64; NaN is left
    out. Both are exactly 0 where the values differ by rounding only, or fewer than two are left.

    Args:
        sizes: of what the values were computed from, in their shape; unset: their own.
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
    """Unbiased standard deviation that leaves NaN out, computed in fp64, in the values' dtype; 0 where they differ by
    rounding only, or fewer than two are left."""
    if dim is None:
        values, dim = values.flatten(), 0
    std = deviations(values, dim)[1].to(values.dtype)
    return std if keepdim else std.squeeze(dim)


class PromptStatistics:
    """Running mean and standard deviation of each prompt's rewards (DDPO, arXiv 2305.13301, section 4.4).

    Rewards of one prompt are kept over rollouts in a buffer; a prompt seen fewer than `min_count` times takes the
    batch's statistics.

    Args:
        buffer_size: rewards kept a prompt.
        min_count: rewards needed before a prompt stands on its own.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """(B,) A = (r - mean) / (std + 1e-4), after the batch's rewards have entered the buffers; NaN gives 0, and so
        does a reward that differs from what it is compared with only by rounding. The standard deviation is the biased
        one."""
        numbers = rewards.double()
        for prompt, reward in zip(prompts, numbers.tolist()):
            if reward == reward:
                self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch = numbers[~numbers.isnan()]
        result = torch.zeros_like(numbers)
        for row, prompt in enumerate(prompts):
            kept = self.buffers.get(prompt, ())
            known = batch if len(kept) < self.min_count else torch.tensor(list(kept), dtype=torch.float64)
            together = torch.cat([known, numbers[row : row + 1]])  # the buffer may have lost this one already
            if len(known) and bool((deviations(together, 0)[0] != 0).any()):
                result[row] = (numbers[row] - known.mean()) / (known.std(unbiased=False) + 1e-4)
        return result.nan_to_num(0.0).float()

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(values) for prompt, values in self.buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}
