"""From rewards to advantages, against TRL 1.16's lines written out again."""

import math

import pytest
import torch

from pisces_rl.trainers.rollouts.advantages import (
    PromptStatistics,
    aggregate_rewards,
    group_advantages,
    group_correlation,
    nanstd,
)

NAN = math.nan


def trl_advantages(rewards_per_func, weights, size, scale_rewards, aggregation):
    """GRPOTrainer._generate_and_score_completions of TRL 1.16, its advantage part (it cannot be called alone)."""

    def std(values, dim, keepdim=False):
        variance = torch.nanmean((values - torch.nanmean(values, dim, keepdim=True)) ** 2, dim, keepdim=keepdim)
        count = torch.sum(~torch.isnan(values), dim, keepdim=keepdim).float()
        factor = torch.where(count > 1, count / (count - 1), torch.ones_like(count))
        return torch.sqrt(variance * factor)

    unscorable = torch.isnan(rewards_per_func).all(dim=1)
    if aggregation == "sum_then_normalize":
        rewards = (rewards_per_func * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable] = torch.nan
        advantages = rewards - torch.nanmean(rewards.view(-1, size), dim=1).repeat_interleave(size)
        if scale_rewards == "group":
            advantages = advantages / (std(rewards.view(-1, size), 1).repeat_interleave(size) + 1e-4)
        elif scale_rewards == "batch":
            advantages = advantages / (std(rewards, 0) + 1e-4)
    else:
        grouped = rewards_per_func.view(-1, size, rewards_per_func.shape[1])
        scaled = (grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (std(grouped, 1, keepdim=True) + 1e-4)
        rewards = (scaled.reshape(rewards_per_func.shape) * weights.unsqueeze(0)).nansum(dim=1)
        rewards[unscorable] = torch.nan
        advantages = (rewards - torch.nanmean(rewards)) / (std(rewards, 0) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


def cases():
    values = 3 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    holes = values.clone()
    holes[1, 0] = holes[5, 1] = holes[7] = NAN  # one missing, and a sample that no reward judges
    column = values.clone()
    column[:, 1] = NAN  # a reward that never applies
    group = values.clone()
    group[4:8] = NAN  # a whole group without rewards
    equal = values.clone()
    equal[:4] = 1.0  # a group that solves everything
    return {"plain": values, "holes": holes, "column": column, "group": group, "equal": equal}


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_trls(case, scale_rewards, aggregation):
    values, weights = cases()[case], torch.tensor([1.0, 0.3])
    ours, rewards, _ = group_advantages(values, weights, 4, scale_rewards=scale_rewards, aggregation=aggregation)
    theirs = trl_advantages(values.clone(), weights, 4, scale_rewards, aggregation)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.isfinite().all()
    assert torch.equal(rewards.isnan(), values.isnan().all(1))


def test_a_group_by_hand():
    advantages, rewards, std = group_advantages(
        torch.tensor([[1.0], [2.0], [3.0], [7.0], [7.0], [7.0]]), torch.ones(1), 3
    )
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0, 1.0, 0, 0, 0]) / 1.0001)
    assert rewards.tolist() == [1, 2, 3, 7, 7, 7]
    assert std.tolist() == [1, 1, 1, 0, 0, 0]


def test_groups_do_not_leak_into_each_other():
    values = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
    changed = values.clone()
    changed[4:] *= 100
    first, second = (group_advantages(v, torch.ones(1), 4)[0][:4] for v in (values, changed))
    assert torch.equal(first, second)


def test_normalising_first_keeps_an_easy_reward_from_starving_a_hard_one():
    hard = torch.tensor([0.0, 0.01, 0.02, 0.03])
    easy = torch.tensor([300.0, 100.0, -100.0, -300.0])
    values, weights = torch.stack([hard, easy], 1), torch.tensor([2.0, 1.0])
    by_sum = group_advantages(values, weights, 4)[0]
    by_reward = group_advantages(values, weights, 4, aggregation="normalize_then_sum")[0]
    assert by_sum[0] > by_sum[3] and by_reward[0] < by_reward[3]


def test_weighted_sum_leaves_out_what_does_not_apply():
    values = torch.tensor([[1.0, 10.0], [NAN, 10.0], [NAN, NAN]])
    total = aggregate_rewards(values, torch.tensor([2.0, 0.5]))
    assert total[:2].tolist() == [7.0, 5.0] and total[2].isnan()


def test_nanstd():
    values = torch.tensor([[1.0, 2.0, NAN, 4.0], [5.0, NAN, NAN, NAN], [NAN] * 4])
    torch.testing.assert_close(nanstd(values, dim=1), torch.tensor([torch.tensor([1.0, 2, 4]).std(), 0.0, 0.0]))
    torch.testing.assert_close(nanstd(values), torch.tensor([1.0, 2, 4, 5]).std())
    assert nanstd(values, dim=1, keepdim=True).shape == (3, 1)


class TestPromptStatistics:
    def test_a_new_prompt_uses_the_batch_and_a_known_one_its_own_statistics(self):
        statistics = PromptStatistics(buffer_size=8, min_count=4)
        first = torch.tensor([0.0, 2.0, 10.0, 20.0])
        a = statistics.advantages(["x", "x", "y", "y"], first)
        torch.testing.assert_close(a, (first - first.mean()) / (first.std(unbiased=False) + 1e-4))
        second = torch.tensor([4.0, 6.0, 30.0, 40.0])
        b = statistics.advantages(["x", "x", "y", "y"], second)
        x, y = torch.tensor([0.0, 2, 4, 6]), torch.tensor([10.0, 20, 30, 40])
        expected = torch.cat(
            [
                (second[:2] - x.mean()) / (x.std(unbiased=False) + 1e-4),
                (second[2:] - y.mean()) / (y.std(unbiased=False) + 1e-4),
            ]
        )
        torch.testing.assert_close(b, expected)

    def test_the_buffer_forgets_the_oldest(self):
        statistics = PromptStatistics(buffer_size=2, min_count=2)
        statistics.advantages(["x"] * 4, torch.tensor([100.0, 100.0, 1.0, 3.0]))
        assert statistics.state_dict() == {"x": [1.0, 3.0]}

    def test_missing_rewards_neither_count_nor_train(self):
        statistics = PromptStatistics(buffer_size=4, min_count=2)
        result = statistics.advantages(["x", "x", "x", "z"], torch.tensor([1.0, NAN, 3.0, NAN]))
        torch.testing.assert_close(result, torch.tensor([-1.0, 0.0, 1.0, 0.0]) / 1.0001)
        assert statistics.state_dict() == {"x": [1.0, 3.0]}
        assert statistics.advantages(["q"], torch.tensor([NAN])).tolist() == [0.0]

    def test_state_round_trip(self):
        one, other = PromptStatistics(3, 2), PromptStatistics(3, 2)
        one.advantages(["x"] * 5, torch.arange(5.0))
        other.load_state_dict(one.state_dict())
        new = torch.tensor([7.0, 1.0])
        assert torch.equal(one.advantages(["x", "x"], new), other.advantages(["x", "x"], new))
        assert one.state_dict() == other.state_dict()


def test_correlation_within_groups():
    """Of three groups, whose own means do not count; rows count where both rewards apply."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 4, generator=generator) + torch.arange(3).repeat_interleave(4)[:, None] * 100
    values[5, 1] = NAN
    values[:, 2] = 0.1  # does not vary
    values[:, 3] = 7 - 2 * values[:, 0] + torch.arange(3).repeat_interleave(4) * 50
    result = group_correlation(values, 4)
    assert result[2].isnan().all() and result[0, 3].item() == pytest.approx(-1, abs=1e-5)
    x, y = [], []
    for group in values.double().split(4):
        known = ~group[:, 1].isnan()
        x += (group[:, 0] - group[:, 0].mean())[known].tolist()
        y += (group[:, 1] - group[:, 1].nanmean())[known].tolist()
    x, y = torch.tensor(x), torch.tensor(y)
    assert result[0, 1].item() == pytest.approx((x @ y / (x.norm() * y.norm())).item(), rel=1e-5)
    torch.testing.assert_close(result, result.T, equal_nan=True)
