"""Metrics of maps: known values, and intervals that cover."""

import pytest
import torch
from scipy.stats import spearmanr

from pisces_rl.ot import metrics


@pytest.fixture
def x():
    return torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_l2_uvp(x):
    assert metrics.l2_uvp(x, x).value == 0
    constant = metrics.l2_uvp(x.mean(0).expand_as(x), x)
    assert constant.value == pytest.approx(100) and constant.low < 100 < constant.high


def test_displacement_cosine(x):
    truth = x + torch.tensor([1.0, 0, 0, 0, 0])
    assert metrics.displacement_cosine(x, truth, truth).value == pytest.approx(1)
    assert metrics.displacement_cosine(x, 2 * x - truth, truth).value == pytest.approx(-1)
    sideways = x + torch.tensor([0, 3.0, 0, 0, 0])
    assert metrics.displacement_cosine(x, sideways, truth).value == pytest.approx(0)


def test_mutual_knn(x):
    assert metrics.mutual_knn(x, x * 3 + 1).value == 1
    chance = metrics.mutual_knn(x, x.flip(0), k=10)
    assert chance.value == pytest.approx(10 / 299, abs=0.02)
    with pytest.raises(ValueError, match="k=300"):
        metrics.mutual_knn(x, x, k=300)


def test_distance_spearman(x):
    y = x.pow(3) + 0.5 * torch.randn(300, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimate = metrics.distance_spearman(x, y)
    reference = spearmanr(torch.pdist(x).numpy(), torch.pdist(y).numpy()).statistic
    assert estimate.value == pytest.approx(reference, abs=1e-6)
    assert estimate.low < estimate.value < estimate.high


def test_paired_recall(x):
    recall = metrics.paired_recall(x * 2, x)
    assert [recall[k].value for k in (1, 5, 10)] == [1, 1, 1]
    rolled = metrics.paired_recall(x.roll(1, 0), x)
    assert rolled[1].value < 0.1
    constant = metrics.paired_recall(torch.ones_like(x), torch.ones_like(x))  # all tie: no better than chance
    assert constant[10].value == 0


def test_distance_spearman_of_ties_is_scipys(x):
    x, y = x.round(), (x + 0.3).round()
    reference = spearmanr(torch.pdist(x).numpy(), torch.pdist(y).numpy()).statistic
    assert metrics.distance_spearman(x, y).value == pytest.approx(reference, abs=1e-9)


def test_points_without_a_meaning_are_errors(x):
    broken = x.clone()
    broken[3, 2] = float("nan")
    for measure in (metrics.l2_uvp, metrics.mutual_knn, metrics.distance_spearman, metrics.paired_recall):
        with pytest.raises(ValueError, match="finite points"):
            measure(broken, x)
    with pytest.raises(ValueError, match="all points are equal"):
        metrics.l2_uvp(x, torch.ones_like(x))
    with pytest.raises(ValueError, match="not all equal"):
        metrics.default_blur(torch.ones(5, 3))


def test_divergence_from_tells_one_distribution_from_two(x):
    y = torch.randn(300, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    blur = metrics.default_blur(y)
    same, other = metrics.divergence_from(x, y, blur=blur), metrics.divergence_from(x + 1, y, blur=blur)
    assert other.low > same.high and other.low < other.value < other.high


def test_bootstrap_covers():
    hits = 0
    for seed in range(40):
        rows = torch.randn(80, generator=torch.Generator().manual_seed(seed))
        estimate = metrics.bootstrap(lambda r: r.mean(0), rows, seed)
        hits += estimate.low <= 0 <= estimate.high
    assert hits >= 33


def test_the_default_blur_does_not_prefer_collapsed_points():
    """At a small blur it does: in 64 dimensions even the mean is nearer to a sample than another sample is."""
    x, y = (torch.randn(512, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    blur = metrics.default_blur(y)
    assert metrics.divergence_from(x, y, blur=blur).value < metrics.divergence_from(x * 0.1, y, blur=blur).value
    small = blur / 10**0.5
    assert metrics.divergence_from(x, y, blur=small).value > metrics.divergence_from(x * 0.1, y, blur=small).value
