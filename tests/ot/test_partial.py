"""The two partial problems against POT and a linear programme, and what the PISCES iteration is."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pisces_rl.ot import (
    ConvergenceWarning,
    dummy_point_transport_plan,
    partial_transport_plan,
    pisces_plan,
    transport_cost,
    transport_plan,
)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(2, 6, 9, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.1 for n in (6, 9))
    return cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


@pytest.mark.parametrize("reg", [0.5, 0.1, 0.03])
@pytest.mark.parametrize("mass", [0.3, 0.9])
def test_uniform_reference_is_pots_entropic_partial(inputs, reg, mass):
    cost, a, b = inputs
    ours = partial_transport_plan(
        cost, a, b, mass=mass, reg=reg, reference="uniform", tolerance=1e-11, max_iterations=50_000
    )
    for k in range(2):
        theirs = ot.partial.entropic_partial_wasserstein(
            a[k].numpy(), b[k].numpy(), cost[k].numpy(), reg, m=mass, numItermax=100_000, stopThr=1e-15
        )
        assert np.abs(ours.plan[k].numpy() - theirs).max() < 1e-8


@pytest.mark.parametrize("reg", [0.1, 0.02])
def test_dummy_point_is_pots_sinkhorn_of_the_extended_problem(inputs, reg):
    cost, a, b = inputs
    ours = dummy_point_transport_plan(cost, a, b, mass=0.7, reg=reg, tolerance=1e-11, max_iterations=50_000)
    for k in range(2):
        extended = np.pad(cost[k].numpy(), ((0, 1), (0, 1)))
        extended[-1, -1] = 1e3
        weights = [np.append(w[k].numpy(), 0.3) for w in (a, b)]
        theirs = ot.sinkhorn(*weights, extended, reg, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
        assert np.abs(ours.plan[k].numpy() - theirs[:-1, :-1]).max() < 1e-8


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 14), mass=st.sampled_from([0.2, 0.6, 0.9]), seed=st.integers(0, 2**20))
def test_random_partial_problems_are_pots(n, m, mass, seed):
    generator = torch.Generator().manual_seed(seed)
    cost, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, m), (n,), (m,)))
    a, b = (a + 0.1) / (a + 0.1).sum(), (b + 0.1) / (b + 0.1).sum()
    uniform = partial_transport_plan(
        cost, a, b, mass=mass, reg=0.1, reference="uniform", tolerance=1e-11, max_iterations=50_000
    )
    theirs = ot.partial.entropic_partial_wasserstein(
        a.numpy(), b.numpy(), cost.numpy(), 0.1, m=mass, numItermax=100_000, stopThr=1e-15
    )
    assert np.abs(uniform.plan.numpy() - theirs).max() < 1e-7
    dummy = dummy_point_transport_plan(cost, a, b, mass=mass, reg=0.1, tolerance=1e-11, max_iterations=50_000)
    extended = np.pad(cost.numpy(), ((0, 1), (0, 1)))
    extended[-1, -1] = 1e3
    weights = [np.append(w.numpy(), 1 - mass) for w in (a, b)]
    theirs = ot.sinkhorn(*weights, extended, 0.1, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    assert np.abs(dummy.plan.numpy() - theirs[:-1, :-1]).max() < 1e-7


@pytest.mark.parametrize("reference", ["product", "uniform"])
def test_all_of_the_mass_is_solved_as_the_balanced_problem(inputs, reference):
    """Its block ascent would take thousands of iterations; beside it a problem of less mass keeps its own."""
    cost, a, b = inputs
    mass = torch.tensor([1.0, 0.6], dtype=torch.float64)
    both = partial_transport_plan(cost, a, b, mass=mass, reg=0.05, reference=reference, tolerance=1e-9)
    balanced = transport_plan(cost[:1], a[:1], b[:1], reg=0.05, tolerance=1e-9)
    assert max(both.iterations[0], balanced.iterations[0]) <= 60
    torch.testing.assert_close(both.plan[:1], balanced.plan, atol=1e-9, rtol=0)
    if reference == "product":
        torch.testing.assert_close(both.value[:1], balanced.value)
    alone = partial_transport_plan(cost[1:], a[1:], b[1:], mass=0.6, reg=0.05, reference=reference, tolerance=1e-9)
    torch.testing.assert_close(both.plan[1:], alone.plan, atol=1e-9, rtol=0)
    gradient = torch.autograd.functional.jacobian(
        lambda c: partial_transport_plan(c, a, b, mass=mass, reg=0.05, reference=reference).value.sum(), cost
    )
    torch.testing.assert_close(gradient, both.plan, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "solve",
    [
        lambda c: dummy_point_transport_plan(c, mass=0.9, reg=1e-3, max_iterations=1),
        lambda c: partial_transport_plan(c, mass=0.9, reg=1e-3, max_iterations=1),
        lambda c: partial_transport_plan(c, mass=0.9, reg=1e-3, max_iterations=1, reference="uniform"),
        lambda c: transport_plan(c, reg=1e-3, max_iterations=1),
    ],
)
def test_warnings_point_at_the_caller(inputs, solve):
    with pytest.warns(ConvergenceWarning) as caught:
        solve(inputs[0])
    assert caught[0].filename == __file__


def test_the_published_iteration_says_how_far_it_came(inputs):
    done = pisces_plan(inputs[0], mass=0.9, reg=0.05)
    assert (done.change < 1e-3).all() and (done.iterations < 200).all() and done.plan.shape == inputs[0].shape
    short = pisces_plan(inputs[0], mass=0.9, reg=0.05, max_iterations=2, tolerance=1e-9)
    assert (short.change > 1e-9).all() and (short.iterations == 2).all()
    with pytest.raises(ValueError, match=r"reg=0\.05 is .* times smaller"):
        pisces_plan(inputs[0].float() * 1e6, mass=1.0, reg=0.05)


@pytest.mark.parametrize("solve", [partial_transport_plan, dummy_point_transport_plan])
def test_small_reg_is_the_linear_programme(inputs, solve):
    cost, a, b = inputs
    plan = solve(cost, a, b, mass=0.6, reg=1e-3, tolerance=1e-8, max_iterations=200_000).plan
    for k in range(2):
        rows, columns = np.kron(np.eye(6), np.ones(9)), np.kron(np.ones(6), np.eye(9))
        exact = linprog(
            cost[k].numpy().ravel(),
            A_ub=np.vstack([rows, columns]),
            b_ub=np.concatenate([a[k].numpy(), b[k].numpy()]),
            A_eq=np.ones((1, 54)),
            b_eq=[0.6],
        ).fun
        assert float(transport_cost(cost[k], plan[k])) == pytest.approx(exact, abs=6e-3)
        assert exact == pytest.approx(
            (
                ot.partial.partial_wasserstein(a[k].numpy(), b[k].numpy(), cost[k].numpy(), m=0.6) * cost[k].numpy()
            ).sum(),
            abs=1e-8,
        )


@pytest.mark.parametrize("solve", [partial_transport_plan, dummy_point_transport_plan])
@pytest.mark.parametrize(
    "reg, size",
    [
        (1.0, (6, 9)),
        (0.05, (6, 9)),
        (0.001, (4, 6)),
        pytest.param(0.001, (6, 9), marks=pytest.mark.slow),  # 30,000 iterations
    ],
)
def test_mass_and_bounds_hold_in_fp32(inputs, solve, reg, size):
    cost, a, b = (x.float() for x in inputs)
    rows, columns = size
    cost, a, b = cost[:, :rows, :columns], a[:, :rows], b[:, :columns]
    a, b = (x / x.sum(1, keepdim=True) for x in (a, b))
    result = solve(cost, a, b, mass=torch.tensor([0.4, 0.9]), reg=reg, max_iterations=100_000)
    assert result.converged.all()
    torch.testing.assert_close(result.plan.sum((1, 2)), torch.tensor([0.4, 0.9]), atol=2e-5, rtol=0)
    assert (result.plan.sum(2) - a).max() < 2e-5 and (result.plan.sum(1) - b).max() < 2e-5


@pytest.mark.parametrize("solve", [partial_transport_plan, dummy_point_transport_plan])
def test_all_the_mass_is_the_balanced_plan(inputs, solve):
    cost, a, b = inputs
    partial = solve(cost, a, b, mass=1.0, reg=0.05, tolerance=1e-10, max_iterations=100_000)
    balanced = transport_plan(cost, a, b, reg=0.05, tolerance=1e-10)
    assert (partial.plan - balanced.plan).abs().max() < 1e-6


@pytest.mark.parametrize("solve", [partial_transport_plan, dummy_point_transport_plan, pisces_plan])
def test_padding_and_batch_mates_change_nothing(inputs, solve):
    cost, a, b = (x.float() for x in inputs)

    def plan(cost, a, b):
        result = solve(cost, a, b, mass=0.7, reg=0.02)
        return result if isinstance(result, torch.Tensor) else result.plan

    together = plan(cost, a, b)
    assert (plan(cost[1], a[1], b[1]) - together[1]).abs().max() < 1e-6
    wide = torch.full((3, 8, 12), float("nan"))
    wide[:2, :6, :9] = cost
    a_wide, b_wide = torch.zeros(3, 8), torch.full((3, 12), 1 / 12)
    a_wide[:2, :6], b_wide[:2] = a, torch.nn.functional.pad(b, (0, 3))
    padded = plan(wide, a_wide, b_wide)
    assert (padded[:2, :6, :9] - together).abs().max() < 1e-6
    assert padded[2].abs().max() == 0 and padded[:2, 6:].abs().max() == 0


def test_the_published_iteration_is_unbalanced_transport_with_counting_reference(inputs):
    cost, a, b = inputs
    a, b = torch.full_like(a, 1 / 6), torch.full_like(b, 1 / 9)
    for mass in (0.5, 0.9):
        plan = pisces_plan(cost, a, b, mass=mass, reg=0.05, tolerance=1e-13, max_iterations=5000).plan
        other = transport_plan(cost, a, b, reg=0.05, reach=0.05 * mass / (1 - mass), tolerance=1e-12).plan
        rows, others = (p / p.sum(2, keepdim=True) for p in (plan, other))
        assert (rows - others).abs().max() < 1e-9
        assert (plan.sum((1, 2)) - mass).abs().max() > 0.05  # not a plan of that mass
    whole = pisces_plan(cost, a, b, mass=1.0, reg=0.05, tolerance=1e-13, max_iterations=5000).plan
    assert (whole - transport_plan(cost, a, b, reg=0.05, tolerance=1e-11).plan).abs().max() < 1e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mass=1.2), "mass: exceeds"),
        (dict(mass=0.0), "mass=0.0"),
        (dict(mass=torch.tensor([0.5, -0.1])), "mass: expected > 0"),
        (dict(mass=torch.tensor([0.5, 0.1, 0.2])), r"mass: expected a number or \(2,\)"),
        (dict(reg=0), "reg=0"),
        (dict(max_iterations=0), "max_iterations=0"),
        (dict(max_iterations=2.5), "max_iterations=2.5"),
    ],
)
@pytest.mark.parametrize("solve", [partial_transport_plan, dummy_point_transport_plan])
def test_bad_input_names_the_argument(inputs, solve, change, message):
    cost, a, b = inputs
    with pytest.raises(ValueError, match=message):
        solve(cost, a, b, **(dict(mass=0.5, reg=0.1) | change))


def test_bad_input_of_one_kind(inputs):
    with pytest.raises(ValueError, match="reference='counting'"):
        partial_transport_plan(*inputs, mass=0.5, reg=0.1, reference="counting")
    with pytest.raises(ValueError, match=r"mass=1\.5"):
        pisces_plan(*inputs, mass=1.5)
