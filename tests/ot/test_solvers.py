"""geomloss under a plan or a divergence: the answers, errors and warnings of the native solver."""

import importlib.util

import ot
import pytest
import torch

from pisces_rl.ot import (
    BankDivergence,
    ConvergenceWarning,
    dummy_point_transport_plan,
    geomloss_solver,
    partial_transport_plan,
    transport_plan,
)
from pisces_rl.ot.plans import SOLVERS

NAN = float("nan")
TIGHT = dict(reg=0.1, tolerance=1e-8, max_iterations=50_000)
KINDS = {
    "balanced": lambda *problem, **options: transport_plan(*problem, **TIGHT, **options),
    "unbalanced": lambda *problem, **options: transport_plan(*problem, reach=0.3, **TIGHT, **options),
    "nearly balanced": lambda *problem, **options: transport_plan(*problem, reach=300.0, **TIGHT, **options),
    "dummy point": lambda *problem, **options: dummy_point_transport_plan(*problem, mass=0.6, **TIGHT, **options),
    "all of the mass": lambda *problem, **options: partial_transport_plan(
        *problem, mass=torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), reference="uniform", **TIGHT, **options
    ),
}


def problem(dtype=torch.float64):
    """Three problems of 6 x 9 cells: one whole, one with padding of NaN, one without any weight in a."""
    generator = torch.Generator().manual_seed(0)
    cost, a, b = (torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((6, 9), (6,), (9,)))
    a[1, -2:], b[1, 0], a[2] = 0, 0, 0
    cost[1, -2:], cost[1, :, 0], cost[2] = NAN, NAN, NAN
    b = b / b.sum(1, keepdim=True)
    return cost.to(dtype), (a / a.sum(1, keepdim=True).clamp_min(1e-9)).to(dtype), b.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_native_ones(kind):
    cost, a, b = problem()
    plans, gradients = [], []
    for solver in SOLVERS:
        own = cost.clone().requires_grad_()
        plans.append(KINDS[kind](own, a, b, solver=solver))
        assert plans[-1].converged.all()
        gradients += torch.autograd.grad(plans[-1].value.sum(), own)
    native, other = plans
    torch.testing.assert_close(other.plan, native.plan, atol=1e-7, rtol=0)
    torch.testing.assert_close(other.value, native.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=0)
    sums = [p.potential_a.nan_to_num()[:, :, None] + p.potential_b[:, None] for p in plans]  # each but for a constant
    torch.testing.assert_close(sums[1][native.plan > 0], sums[0][native.plan > 0], atol=1e-6, rtol=0)
    assert (other.plan[2] == 0).all() and other.value[2] == 0 and other.marginal_error[2] == 0
    assert (other.plan[1, -2:] == 0).all() and (other.plan[1, :, 0] == 0).all()


@pytest.mark.parametrize("reg", [1.0, 0.05, 0.01])
def test_plans_are_pots(reg):
    cost, a, b = (x[0] for x in problem())
    theirs = ot.sinkhorn(
        a.numpy(), b.numpy(), cost.numpy(), reg, method="sinkhorn_log", stopThr=1e-12, numItermax=100_000
    )
    plan = transport_plan(cost, a, b, reg=reg, tolerance=1e-7, max_iterations=50_000, solver="geomloss")
    assert (plan.plan - torch.from_numpy(theirs)).abs().sum() < 1e-5 and plan.marginal_error < 1e-7


def test_a_gradient_is_a_finite_difference():
    cost, a, b = (x[:2] for x in problem())
    cost = cost.nan_to_num(0.5).requires_grad_()
    for kind in ("balanced", "unbalanced"):
        (gradient,) = torch.autograd.grad(KINDS[kind](cost, a, b, solver="geomloss").value.sum(), cost)
        way = torch.rand(cost.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            ends = [KINDS[kind](cost + step * way, a, b, solver="geomloss").value.sum() for step in (1e-5, -1e-5)]
        assert float((gradient * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("reach", [None, 3.0])
def test_mates_in_a_batch_change_nothing_however_far_their_costs_span(reach):
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(3, 8, 12, generator=generator) * torch.tensor([1.0, 20.0, 60.0])[:, None, None]
    cost = cost + (1000 if reach is None else 0)
    options = dict(reg=0.2, reach=reach, tolerance=1e-3)
    together = transport_plan(cost, **options, solver="geomloss")
    for k in range(3):
        alone = transport_plan(cost[k], **options, solver="geomloss")
        torch.testing.assert_close(alone.plan, together.plan[k], atol=1e-6, rtol=1e-4)
    native = transport_plan(cost, **options)
    assert (together.plan - native.plan).abs().sum((1, 2)).max() < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cost, a, b: (cost, a, 2 * b), "a, b: a balanced plan needs equal masses"),
        (lambda cost, a, b: (cost, -a, b), "a: weights must be finite and >= 0"),
        (lambda cost, a, b: (cost, a, b * NAN), "b: weights must be finite and >= 0"),
        (lambda cost, a, b: (cost * NAN, a, b), "cost: NaN or infinite where both weights are positive"),
        (lambda cost, a, b: (cost * 1e20, a, b), "reg=0.1 is .* times smaller than the range of the costs"),
        (lambda cost, a, b: (cost, a[:, :4], b), r"a: expected \(3, 6\)"),
    ],
)
def test_errors_are_the_same(change, message):
    for solver in SOLVERS:
        with pytest.raises(ValueError, match=message):
            transport_plan(*change(*problem()), reg=0.1, solver=solver)


def test_what_misses_its_tolerance_says_so():
    cost, a, b = problem(torch.float32)
    for solver in SOLVERS:
        with pytest.warns(ConvergenceWarning, match="2 of 3 plans miss the marginal error of 1e-07.*after 2 iter"):
            plan = transport_plan(cost, a, b, reg=0.01, tolerance=1e-7, max_iterations=2, solver=solver)
        assert (plan.marginal_error[:2] > 1e-7).all()
        with pytest.warns(ConvergenceWarning, match="the bank's self term misses the marginal error of 1e-12"):
            bank = BankDivergence(torch.randn(9, 4), blur=2.0, tolerance=1e-12, max_iterations=3, solver=solver)
        assert bank.self_error > 1e-12


def test_an_unknown_solver_and_a_mass_that_geomloss_does_not_bound():
    cost, a, b = (x[0] for x in problem())
    for call in (
        lambda: transport_plan(cost, a, b, reg=0.1, solver="pot"),
        lambda: partial_transport_plan(cost, a, b, mass=0.5, reg=0.1, solver="pot"),
        lambda: dummy_point_transport_plan(cost, a, b, mass=0.5, reg=0.1, solver="pot"),
        lambda: BankDivergence(torch.rand(4, 2), blur=1.0, solver="pot"),
    ):
        with pytest.raises(ValueError, match="solver='pot': expected one of native, geomloss"):
            call()
    with pytest.raises(ValueError, match="cannot solve plans of a bounded mass; use solver='native', dummy_point"):
        partial_transport_plan(cost, a, b, mass=0.5, reg=0.1, solver="geomloss")


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_stay_enabled_or_disabled(enabled, monkeypatch):
    cost, a, b = problem(torch.float32)
    with torch.set_grad_enabled(enabled):
        transport_plan(cost, a, b, reg=0.1, solver="geomloss")
        assert torch.is_grad_enabled() == enabled
        monkeypatch.setattr(torch.Tensor, "logsumexp", lambda *args: 1 / 0)  # geomloss would leave them disabled
        with pytest.raises(ZeroDivisionError):
            transport_plan(cost, a, b, reg=0.1, solver="geomloss")
        assert torch.is_grad_enabled() == enabled


@pytest.mark.parametrize("reach", [None, 4.0])
def test_divergences_are_the_native_ones(reach):
    generator = torch.Generator().manual_seed(0)
    bank, x = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((60, 16), (2, 8, 16)))
    a = torch.tensor([[0.125] * 8, [0.25] * 4 + [0.0] * 4], dtype=torch.float64)
    weights = torch.rand(60, generator=generator)
    weights[:3] = 0
    results = []
    for solver in SOLVERS:
        divergence = BankDivergence(bank, blur=3.0, reach=reach, weights=weights, tolerance=1e-8, solver=solver)
        points = x.clone().requires_grad_()
        value = divergence(points, a)
        (gradient,) = torch.autograd.grad(value.sum(), points)
        results.append((divergence.self_value, value.detach(), gradient, divergence.per_sample(x, a)))
        assert divergence.self_error < 1e-8
        assert divergence(x[0], torch.zeros(8)) == 0
    for native, other in zip(*results):
        torch.testing.assert_close(other, native, atol=1e-5, rtol=1e-6)


def test_a_bank_beyond_memory_names_pykeops(monkeypatch):
    monkeypatch.setattr(geomloss_solver, "TENSORIZED_CELLS", 100)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pykeops" else found(name, *a))
    bank = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert geomloss_solver.backend_for(bank) == "tensorized"  # it fits
    monkeypatch.setattr(geomloss_solver, "COPIES", 10**12)
    with pytest.raises(ValueError, match="solver='geomloss': the costs of 20 points need .* pip install pykeops, or"):
        BankDivergence(bank, blur=1.0, solver="geomloss")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name)
    assert geomloss_solver.backend_for(bank) == "online"
