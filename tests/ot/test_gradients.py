"""The value's gradient is the plan: finite differences in costs and in points."""

import pytest
import torch
from torch.autograd import gradcheck

from pisces_rl.ot import (
    dummy_point_transport_plan,
    partial_transport_plan,
    squared_cost,
    transport_cost,
    transport_plan,
)

TIGHT = dict(reg=0.2, tolerance=1e-12, max_iterations=100_000)
KINDS = {
    "balanced": lambda cost, a, b: transport_plan(cost, a, b, **TIGHT),
    "unbalanced": lambda cost, a, b: transport_plan(cost, a, b, reach=0.4, **TIGHT),
    "partial, product": lambda cost, a, b: partial_transport_plan(cost, a, b, mass=0.6, **TIGHT),
    "partial, uniform": lambda cost, a, b: partial_transport_plan(cost, a, b, mass=0.6, reference="uniform", **TIGHT),
    "dummy point": lambda cost, a, b: dummy_point_transport_plan(cost, a, b, mass=0.6, **TIGHT),
}


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.1 for n in (4, 6))
    a[1, 3] = 0  # padding
    return a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_with_respect_to_costs(kind, weights):
    cost = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda c: KINDS[kind](c, *weights).value, cost, atol=1e-6)
    result = KINDS[kind](cost, *weights)
    (gradient,) = torch.autograd.grad(result.value.sum(), cost)
    torch.testing.assert_close(gradient, result.plan)
    assert not result.plan.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_with_respect_to_points(kind, weights):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.rand(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, y: KINDS[kind](squared_cost(x, y), *weights).value, (x, y), atol=1e-6)


def test_transport_cost_holds_the_plan_fixed(weights):
    cost = torch.rand(2, 4, 6, dtype=torch.float64, requires_grad=True)
    plan = transport_plan(cost, *weights, **TIGHT).plan
    value = transport_cost(cost, plan)
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    torch.testing.assert_close(gradient, plan)
    assert (value != transport_plan(cost, *weights, **TIGHT).value).all()
