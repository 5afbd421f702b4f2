"""The divergence to a bank: against geomloss, finite differences, and what grouping must not change."""

import math

import pytest
import torch
from geomloss import SamplesLoss
from torch.utils._python_dispatch import TorchDispatchMode

from pisces_rl.ot import BankDivergence, ConvergenceWarning, divergence


def points(n, d=16, shift=0.0, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + shift


@pytest.mark.parametrize("reach", [None, 4.0])
def test_value_and_gradient_are_geomlosss(reach):
    """geomloss scales unbalanced gradients by (rho + eps / 2) / (rho + eps); ours match finite differences below."""
    x, bank = points(8, shift=0.3, seed=1).requires_grad_(), points(60)
    ours = BankDivergence(bank, blur=3.0, reach=reach, tolerance=1e-10, max_iterations=100_000)(x)
    loss = SamplesLoss(
        "sinkhorn", p=2, blur=3.0, reach=reach, debias=True, diameter=4.0, scaling=0.9999, backend="tensorized"
    )
    theirs = loss(x, bank)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5 if reach is None else 1e-4)
    (gradient,), (reference,) = torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x)
    if reach is None:
        assert (gradient - reference).norm() / reference.norm() < 1e-5


@pytest.mark.parametrize("reach", [None, 4.0])
def test_gradient_is_a_finite_difference(reach):
    bank = BankDivergence(points(40), blur=2.0, reach=reach, tolerance=1e-12, max_iterations=100_000)
    x = points(5, shift=0.3, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(bank(x), x)
    direction = points(5, seed=2)
    with torch.no_grad():
        numeric = (bank(x + 1e-5 * direction) - bank(x - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)


def test_a_group_equal_to_the_bank_is_at_distance_zero():
    bank = points(30)
    assert abs(float(BankDivergence(bank, blur=1.0, tolerance=1e-9, max_iterations=50_000)(bank))) < 1e-7


def test_groups_do_not_know_each_other_and_padding_changes_nothing():
    bank = BankDivergence(points(50, dtype=torch.float32), blur=2.0)
    groups = torch.stack([points(8, shift=s, seed=s, dtype=torch.float32) for s in (0, 1, 5)])
    together = bank(groups)
    for k in range(3):
        torch.testing.assert_close(bank(groups[k]), together[k], rtol=1e-5, atol=1e-5)
    padded = torch.cat([groups, torch.full((3, 2, 16), 7.0)], 1)
    weights = torch.cat([torch.full((8,), 1 / 8), torch.zeros(2)]).expand(3, -1)
    torch.testing.assert_close(bank(padded, weights), together, rtol=1e-5, atol=1e-5)


def test_shares_of_points_average_to_the_divergence_and_find_the_outlier():
    bank = BankDivergence(points(50), blur=2.0, tolerance=1e-8)
    x = points(8, seed=3)
    x[5] += 3
    credit = bank.per_sample(x)
    assert float(credit.mean()) == pytest.approx(float(bank(x)), abs=1e-6)
    assert credit.argmax() == 5


@pytest.mark.parametrize("reach", [None, 1.5])
def test_shares_of_points_are_derivatives_in_their_weights(reach):
    """Balanced, weights must keep their sum: the difference of two shares."""
    bank = BankDivergence(points(50), blur=2.0, reach=reach, tolerance=1e-12, max_iterations=100_000)
    x, a = points(6, seed=3), torch.tensor([0.1, 0.3, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)
    step = torch.zeros(6, dtype=torch.float64)
    step[1] = 1e-5
    if reach is None:
        step[4] = -1e-5
    numeric = float(bank(x, a + step) - bank(x, a - step)) / 2e-5
    credit = bank.per_sample(x, a)
    assert float((credit * step).sum() / 1e-5) == pytest.approx(numeric, rel=1e-6)


def test_a_penalised_divergence_is_not_negative_whatever_the_mass():
    bank = BankDivergence(points(40), blur=2.0, reach=1.5, tolerance=1e-10, max_iterations=50_000)
    for mass in (0.5, 1.0, 1.5):
        assert float(bank(points(40), torch.full((40,), mass / 40, dtype=torch.float64))) >= -1e-9


def test_padding_of_any_value_and_an_empty_group():
    bank = BankDivergence(points(50, dtype=torch.float32), blur=2.0)
    x = points(6, seed=1, dtype=torch.float32)
    weights = torch.tensor([0.25] * 4 + [0.0] * 2)
    for filling in (1e6, float("nan")):
        padded = torch.cat([x[:4], torch.full((2, 16), filling)])
        torch.testing.assert_close(bank(padded, weights), bank(x[:4]), rtol=1e-5, atol=1e-5)
    assert bank(x, torch.zeros(6)) == 0 and bank.per_sample(x, torch.zeros(6)).abs().max() == 0


def test_a_bank_short_of_its_tolerance_says_so():
    with pytest.warns(ConvergenceWarning, match="the bank's self term"):
        bank = BankDivergence(points(50), blur=2.0, tolerance=1e-12, max_iterations=2)
    assert math.isfinite(bank.self_value)


def test_memory_is_bounded_by_chunks(monkeypatch):
    whole = BankDivergence(points(70), blur=2.0)
    monkeypatch.setattr(divergence, "CHUNK_CELLS", 500)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        chunked = BankDivergence(points(70), blur=2.0)
    torch.testing.assert_close(chunked.self_value, whole.self_value)
    assert max(largest) < 70 * 70 / 2  # points, and chunks of cells; never all cells


def test_relative_to_real_groups_of_the_same_size():
    bank = BankDivergence(points(200), blur=2.0)
    real = points(100, seed=9)
    with pytest.raises(RuntimeError, match=r"call calibrate\(real, 8\)"):
        bank.relative(points(8, seed=4))
    mean, deviation = bank.calibrate(real, 8)
    assert bank.calibrate(real, 8) == (mean, deviation)
    assert bank.relative(points(8, seed=4)) == pytest.approx(1, abs=5 * deviation / mean)
    assert bank.relative(points(8, seed=4, shift=2.0)) > 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bank=torch.zeros(3)), "bank: expected"),
        (dict(bank=torch.full((3, 2), float("nan"))), "bank: expected"),
        (dict(bank=torch.zeros(3, 2), blur=0.0), "blur=0.0"),
        (dict(bank=torch.zeros(3, 2), reach=-1.0), "reach=-1.0"),
        (dict(bank=torch.zeros(3, 2), weights=torch.tensor([1.0, -1, 2])), "weights: expected"),
        (dict(bank=torch.zeros(3, 2), weights=torch.tensor([1.0, float("inf"), 2])), "weights: expected"),
        (dict(bank=torch.zeros(3, 2), max_iterations=0), "max_iterations=0"),
    ],
)
def test_bad_banks(arguments, message):
    with pytest.raises(ValueError, match=message):
        BankDivergence(**(dict(blur=1.0) | arguments))


def test_bad_groups():
    bank = BankDivergence(points(10), blur=1.0)
    with pytest.raises(ValueError, match="x: expected"):
        bank(points(4, d=3))
    with pytest.raises(ValueError, match="x: a point of positive weight is NaN"):
        bank(points(4) * float("nan"))
    with pytest.raises(ValueError, match="group_size=11"):
        bank.calibrate(points(10), 11)
