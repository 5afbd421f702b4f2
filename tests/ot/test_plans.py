"""Balanced and unbalanced plans: against POT and SciPy, and what a batch must not change."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pisces_rl.ot import (
    ConvergenceWarning,
    cosine_cost,
    dummy_point_transport_plan,
    partial_transport_plan,
    pisces_plan,
    squared_cost,
    transport_cost,
    transport_plan,
)
from pisces_rl.ot.scaling import scale as scale_kernel


def problem(batch, n, m, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    a = torch.rand(batch, n, generator=generator, dtype=torch.float64) + 0.05
    b = torch.rand(batch, m, generator=generator, dtype=torch.float64) + 0.05
    return cost.to(dtype), (a / a.sum(1, keepdim=True)).to(dtype), (b / b.sum(1, keepdim=True)).to(dtype)


def pot_balanced(cost, a, b, reg):
    cost, a, b = (x.double().numpy() for x in (cost, a, b))
    return torch.from_numpy(
        ot.sinkhorn(a / a.sum(), b / b.sum(), cost, reg, method="sinkhorn_log", stopThr=1e-12, numItermax=200_000)
    )


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12), m=st.integers(1, 30), reg=st.sampled_from([1.0, 0.2, 0.05, 0.02]), seed=st.integers(0, 2**20)
)
def test_balanced_is_pots(n, m, reg, seed):
    cost, a, b = problem(2, n, m, seed)
    plan = transport_plan(cost, a, b, reg=reg, tolerance=1e-10, max_iterations=100_000)
    for k in range(2):
        assert (plan.plan[k] - pot_balanced(cost[k], a[k], b[k], reg)).abs().max() < 1e-8
    single = transport_plan(cost.float(), a.float(), b.float(), reg=reg)
    assert (single.plan.double() - plan.plan).abs().sum((1, 2)).max() < 1e-3
    assert single.converged.all()


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 20),
    reg=st.sampled_from([0.5, 0.1, 0.03]),
    reach=st.sampled_from([0.05, 0.3, 2.0]),
    seed=st.integers(0, 2**20),
)
def test_unbalanced_is_pots(n, m, reg, reach, seed):
    cost, a, b = problem(1, n, m, seed)
    plan = transport_plan(cost, a, b * 1.5, reg=reg, reach=reach, tolerance=1e-10, max_iterations=50_000)
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        a[0].numpy(), 1.5 * b[0].numpy(), cost[0].numpy(), reg, reach, reg_type="kl", numItermax=50_000, stopThr=1e-14
    )
    assert (plan.plan[0] - torch.from_numpy(theirs)).abs().max() < 1e-8


def test_small_reg_is_the_linear_programme():
    cost, a, b = problem(1, 6, 9)
    rows = np.kron(np.eye(6), np.ones(9))
    columns = np.kron(np.ones(6), np.eye(9))
    exact = linprog(
        cost.numpy().ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a[0].numpy(), b[0].numpy()])
    ).fun
    plan = transport_plan(cost, a, b, reg=1e-3, tolerance=1e-9, max_iterations=100_000)
    assert 0 <= float(transport_cost(cost, plan.plan)) - exact < 1e-3 * math.log(54)
    assert exact == pytest.approx(ot.emd2(a[0].numpy(), b[0].numpy(), cost[0].numpy()), abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 10), seed=st.integers(0, 2**20))
def test_random_small_reg_is_the_exact_cost(n, m, seed):
    cost, a, b = problem(1, n, m, seed)
    exact = ot.emd2(a[0].numpy(), b[0].numpy(), cost[0].numpy())
    plan = transport_plan(cost, a, b, reg=2e-3, tolerance=1e-7, max_iterations=100_000).plan
    assert -1e-6 <= float(transport_cost(cost, plan)) - exact < 2e-3 * math.log(n * m + 1) + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_one_dimension_is_sorting(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(1, 12, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    plan = transport_plan(squared_cost(x, y), reg=1e-4, tolerance=1e-5, max_iterations=100_000)
    exact = (x.sort(1).values - y.sort(1).values).square().mean() / 2
    assert float(transport_cost(squared_cost(x, y), plan.plan)) == pytest.approx(float(exact), abs=5e-4)


def test_two_points_in_closed_form():
    """Symmetric 2 x 2: P_11 = 1 / (2 (1 + exp(-c / reg))) for off-diagonal cost c."""
    cost = torch.tensor([[0.0, 0.3], [0.3, 0.0]], dtype=torch.float64)
    plan = transport_plan(cost, reg=0.1, tolerance=1e-12)
    assert float(plan.plan[0, 0]) == pytest.approx(0.5 / (1 + math.exp(-3)), abs=1e-12)
    value = float(transport_cost(cost, plan.plan)) + 0.1 * float((plan.plan * (plan.plan * 4).log()).sum())
    assert float(plan.value) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("reach", [None, 0.3])
def test_value_is_the_primal_one(reach):
    cost, a, b = problem(2, 7, 11)
    plan = transport_plan(cost, a, b, reg=0.05, reach=reach, tolerance=1e-11)

    def kl(p, q):
        return (p * (p / q).log() - p + q).flatten(1).sum(1)

    primal = (plan.plan * cost).sum((1, 2)) + 0.05 * kl(plan.plan, a[:, :, None] * b[:, None])
    if reach is not None:
        primal = primal + reach * (kl(plan.plan.sum(2), a) + kl(plan.plan.sum(1), b))
    torch.testing.assert_close(plan.value, primal, atol=1e-9, rtol=0)
    potentials = plan.potential_a[:, :, None] + plan.potential_b[:, None]
    torch.testing.assert_close(
        plan.plan, a[:, :, None] * b[:, None] * ((potentials - cost) / 0.05).exp(), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("reach", [None, 0.3])
@pytest.mark.parametrize(("reg", "dtype"), [(1.0, torch.float32), (0.05, torch.float32), (0.005, torch.float64)])
def test_padding_order_and_batch_mates_change_nothing(reach, reg, dtype):
    cost, a, b = problem(4, 8, 20, dtype=dtype)
    cost[1] *= 2  # a mate of another range
    options = dict(reg=reg, reach=reach, max_iterations=50_000, tolerance=1e-5 if dtype == torch.float32 else 1e-8)
    together = transport_plan(cost, a, b, **options)
    for k in range(4):
        alone = transport_plan(cost[k], a[k], b[k], **options)
        assert (alone.plan - together.plan[k]).abs().max() < 1e-6
        assert float(alone.value - together.value[k]) == pytest.approx(0, abs=1e-5 * float(cost[k].max()))
    order = torch.tensor([2, 0, 3, 1])
    assert (transport_plan(cost[order], a[order], b[order], **options).plan - together.plan[order]).abs().max() < 1e-6
    for filling in (0.0, 1e4, float("nan"), float("inf")):
        wide = torch.full((4, 11, 26), filling, dtype=dtype)
        wide[:, :8, :20] = cost
        a_wide, b_wide = torch.nn.functional.pad(a, (0, 3)), torch.nn.functional.pad(b, (0, 6))
        padded = transport_plan(wide, a_wide, b_wide, **options)
        assert (padded.plan[:, :8, :20] - together.plan).abs().max() < 1e-6
        assert padded.plan[:, 8:].abs().max() == 0 and padded.plan[:, :, 20:].abs().max() == 0


def test_an_empty_prompt_has_a_zero_plan_and_no_nan():
    cost, a, b = problem(3, 5, 7, dtype=torch.float32)
    a[1] = 0
    cost[1] = float("nan")
    cost.requires_grad_()
    result = transport_plan(cost, a, b, reg=0.05)
    assert result.plan[1].abs().max() == 0 and result.value[1] == 0 and result.marginal_error[1] == 0
    result.value.sum().backward()
    assert cost.grad[1].abs().max() == 0 and cost.grad.isfinite().all()
    assert (result.plan[0] - transport_plan(cost[0].detach(), a[0], b[0], reg=0.05).plan).abs().max() < 1e-6


def test_empty_problems_alone_need_no_iterations():
    """They are solved alone if the other problems anneal; they once iterated to the limit."""
    kernel, a, b = torch.ones(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 4)
    scaled = scale_kernel(kernel, a, b, a + 1, b + 1, 1e-5, 5000)
    assert scaled.done == 1 and not scaled.active.any() and scaled.error.abs().max() == 0


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.01, 0.001])
def test_degenerate_costs(reg):
    identical = torch.zeros(2, 5, 5)
    assert (transport_plan(identical, reg=reg).plan - 1 / 25).abs().max() < 1e-7
    assert (transport_plan(torch.full((1, 4, 6), 3.7), reg=reg).plan - 1 / 24).abs().max() < 1e-7
    assert (transport_plan(torch.rand(3, 1, 1), reg=reg).plan - 1).abs().max() < 1e-6
    x = torch.randn(1, 6, 3)
    same = transport_plan(squared_cost(x, x), reg=reg, max_iterations=50_000)
    assert same.converged.all() and (same.plan - same.plan.transpose(1, 2)).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_costs_and_reg_together_changes_nothing(scale):
    cost, a, b = problem(2, 9, 14, dtype=torch.float32)
    plain = transport_plan(cost, a, b, reg=0.02)
    scaled = transport_plan(cost * scale, a, b, reg=0.02 * scale)
    assert (plain.plan - scaled.plan).abs().max() < 1e-6
    torch.testing.assert_close(scaled.value / scale, plain.value, atol=1e-5, rtol=1e-5)


def test_costs_beyond_the_resolution_of_fp32_are_an_error_and_fp64_solves_them():
    cost, a, b = problem(1, 4, 5)
    with pytest.raises(ValueError, match="reg=.*float64"):
        transport_plan(cost.float() * 1e6, reg=1.0)
    assert transport_plan(cost * 1e6, a, b, reg=1e3, max_iterations=100_000).converged.all()


def test_marginals_are_met_as_stated():
    cost, a, b = problem(5, 16, 40, dtype=torch.float32)
    for tolerance in (1e-2, 1e-5):
        result = transport_plan(cost, a, b, reg=0.02, tolerance=tolerance)
        error = (result.plan.sum(2) - a).abs().sum(1) + (result.plan.sum(1) - b).abs().sum(1)
        assert (error <= tolerance * 1.05 + 2e-6).all() and (result.marginal_error <= tolerance).all()
        assert (result.iterations > 0).all()


def test_a_plan_short_of_its_tolerance_says_so():
    cost, a, b = problem(2, 16, 40)
    with pytest.warns(ConvergenceWarning, match="raise reg or max_iterations"):
        result = transport_plan(cost, a, b, reg=1e-3, max_iterations=10)
    assert not result.converged.all() and result.plan.isfinite().all()


def test_inputs_of_any_layout_and_dtype():
    cost, a, b = problem(3, 6, 10, dtype=torch.float32)
    plain = transport_plan(cost, a, b, reg=0.1).plan
    strided = cost.transpose(1, 2).contiguous().transpose(1, 2)
    assert (transport_plan(strided, a, b, reg=0.1).plan - plain).abs().max() < 1e-7
    assert (transport_plan(cost.transpose(1, 2), b, a, reg=0.1).plan.transpose(1, 2) - plain).abs().max() < 1e-5
    half = cost.bfloat16()
    result = transport_plan(half, a, b, reg=0.1)
    assert result.plan.dtype == torch.float32
    assert torch.equal(result.plan, transport_plan(half.float(), a, b, reg=0.1).plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transport_plan(cost, a, b, reg=0.1).plan, plain)
        points = torch.randn(2, 4, 8)
        assert cosine_cost(points, points).dtype == squared_cost(points, points).dtype == torch.float32
    assert transport_plan(cost[0], a[0], b[0], reg=0.1).plan.shape == (6, 10)
    assert torch.equal(
        transport_plan(cost, a[0], b[0], reg=0.1).plan[0], transport_plan(cost[:1], a[0], b[0], reg=0.1).plan[0]
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_global_modes_are_restored(enabled):
    cost, a, b = problem(1, 4, 5, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.set_grad_enabled(enabled):
            exact = transport_plan(cost, a, b, reg=0.05)
            assert torch.is_grad_enabled() is enabled
            with pytest.raises(ValueError):
                transport_plan(cost * float("nan"), a, b, reg=0.05)
            assert torch.is_grad_enabled() is enabled
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(exact.plan, transport_plan(cost, a, b, reg=0.05).plan, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reach", [None, 0.5])
def test_an_annealed_batch_mate_changes_nothing(reach):
    cost, a, b = problem(3, 8, 20, dtype=torch.float32)
    cost[1] *= 60
    together = transport_plan(cost, a, b, reg=0.05, reach=reach)
    for k in range(3):
        alone = transport_plan(cost[k], a[k], b[k], reg=0.05, reach=reach)
        assert (alone.plan - together.plan[k]).abs().max() < 1e-6
        assert alone.iterations == together.iterations[k]


@pytest.mark.parametrize("reach", [None, 500.0])
def test_a_large_constant_in_the_costs_loses_no_digits(reach):
    """Of integers, so that fp32 holds the costs exactly."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.randint(0, 40, (2, 6, 9), generator=generator).float() + (2**20 if reach is None else 1024)
    single = transport_plan(cost, reg=1.0, reach=reach, max_iterations=50_000)
    double = transport_plan(cost.double(), reg=1.0, reach=reach, max_iterations=50_000)
    assert (single.plan.double() - double.plan).abs().max() < 1e-6
    torch.testing.assert_close(single.value.double(), double.value, rtol=1e-6, atol=0)


def test_a_large_reach_is_the_balanced_plan():
    cost, a, b = problem(2, 8, 20, dtype=torch.float32)
    balanced = transport_plan(cost, a, b, reg=0.05)
    assert (transport_plan(cost, a, b, reg=0.05, reach=1e8).plan - balanced.plan).abs().max() < 1e-5


def test_weights_in_half_precision_balance():
    cost, a, b = problem(2, 8, 50, dtype=torch.float32)
    plan = transport_plan(cost, a.bfloat16(), b.bfloat16(), reg=0.05).plan
    assert (plan - transport_plan(cost, a, b, reg=0.05).plan).abs().sum() < 2e-2


def test_user_set_precisions_are_restored():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    cost, a, b = problem(1, 4, 5, dtype=torch.float32)
    try:
        backend.fp32_precision = "tf32"
        transport_plan(cost, a, b, reg=0.05)
        squared_cost(cost, cost)
        with pytest.raises(ValueError):
            transport_plan(cost * float("nan"), a, b, reg=0.05)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "solve",
    [
        lambda c: transport_plan(c, reg=0.1),
        lambda c: transport_plan(c, reg=0.1, reach=1.0),
        lambda c: partial_transport_plan(c, reg=0.1, mass=0.5),
        lambda c: partial_transport_plan(c, reg=0.1, mass=0.5, reference="uniform"),
        lambda c: dummy_point_transport_plan(c, reg=0.1, mass=0.5),
        lambda c: pisces_plan(c, reg=0.1, mass=0.5).plan,
    ],
)
def test_costs_that_are_not_finite_are_an_error_of_every_plan(solve, bad):
    cost = problem(2, 4, 5, dtype=torch.float32)[0]
    cost[1, 2, 3] = bad
    with pytest.raises(ValueError, match="cost: NaN or infinite"):
        solve(cost)


COST, A, B = problem(2, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a=-A), "a: weights"),
        (dict(b=B * float("nan")), "b: weights"),
        (dict(cost=COST.masked_fill(COST < 0.3, float("nan"))), "cost: NaN"),
        (dict(cost=COST.masked_fill(COST < 0.3, float("inf"))), "cost: NaN or infinite"),
        (dict(cost=COST[0, 0]), r"cost: expected a tensor \(B, N, M\)"),
        (dict(a=A[:, :3]), r"a: expected \(2, 4\)"),
        (dict(b=B[:1].expand(3, -1)), r"b: expected \(2, 5\)"),
        (dict(a=A * 2), "equal masses"),
        (dict(a=A.clone().requires_grad_()), "a: gradients"),
        (dict(reg=0.0), "reg=0.0"),
        (dict(reg=-1), "reg=-1"),
        (dict(reg=float("nan")), "reg=nan"),
        (dict(reach=0), "reach=0"),
        (dict(tolerance=0), "tolerance=0"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    arguments = dict(cost=COST, a=A, b=B, reg=0.1) | change
    with pytest.raises(ValueError, match=message):
        transport_plan(**arguments)


def test_costs_of_points():
    x, y = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(squared_cost(x, y), torch.cdist(x, y).square() / 2)
    unit_x, unit_y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    torch.testing.assert_close(cosine_cost(x, y), squared_cost(unit_x, unit_y))
    assert cosine_cost(torch.zeros(1, 1, 3), torch.ones(1, 1, 3)).item() == 1


def test_iterations_must_be_a_count():
    for wrong in (0, -5, 2.5, None, True):
        with pytest.raises(ValueError, match="max_iterations="):
            transport_plan(torch.rand(2, 3), reg=0.1, max_iterations=wrong)


def test_far_cells_may_underflow_after_the_c_transform():
    """Costs that span 60 to 120 eps: no annealing, and the same plan as in double precision."""
    cost, a, b = problem(4, 16, 40, dtype=torch.float32)
    plan = transport_plan(cost, a, b, reg=0.01, tolerance=1e-6)
    exact = transport_plan(cost.double(), a.double(), b.double(), reg=0.01, tolerance=1e-11)
    assert plan.converged.all() and (plan.plan.double() - exact.plan).abs().sum((1, 2)).max() < 1e-4


def test_precision_settings_are_inherited_again():
    """A solve reads the effective setting, which may be a parent's, and must not pin it."""
    parent, child = torch.backends, torch.backends.mkldnn.matmul
    before = parent.fp32_precision, child.fp32_precision
    try:
        parent.fp32_precision, child.fp32_precision = "tf32", "none"
        transport_plan(torch.rand(3, 4), reg=0.1)
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        parent.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        parent.fp32_precision, child.fp32_precision = before


@pytest.mark.parametrize("shape", [(128, 8, 64), (24, 16, 40)])
def test_a_plan_that_converges_first_does_not_change_afterwards(shape):
    """Under the c-transform, where others' scalings need another kernel: marginals and potentials are the plan's."""
    batch, n, m = shape
    generator = torch.Generator().manual_seed(0)
    torch.randn(16, 272, 64, generator=generator)
    x, y = (torch.randn(batch, k, 64, generator=generator) for k in (n, m))
    cost = cosine_cost(x, y)
    low, high = cost.amin((1, 2), keepdim=True), cost.amax((1, 2), keepdim=True)
    cost = (cost - low) / (high - low)
    solved = transport_plan(cost, reg=0.01, tolerance=1e-3)
    rows, columns = solved.plan.sum(2) - 1 / n, solved.plan.sum(1) - 1 / m
    torch.testing.assert_close(rows.abs().sum(1) + columns.abs().sum(1), solved.marginal_error, rtol=0, atol=1e-5)
    exponents = (solved.potential_a[:, :, None] + solved.potential_b[:, None] - cost) / 0.01
    torch.testing.assert_close(exponents.exp() / (n * m), solved.plan, rtol=1e-3, atol=1e-6)
    alone = transport_plan(cost[:1], reg=0.01, tolerance=1e-6)
    together = transport_plan(cost, reg=0.01, tolerance=1e-6)
    torch.testing.assert_close(together.plan[:1], alone.plan, rtol=0, atol=1e-6)
