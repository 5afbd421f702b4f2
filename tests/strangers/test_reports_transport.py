"""Public reports on optimal transport: weights, costs and points at the edges."""

import pytest
import torch

from pisces_rl.ot import BankDivergence, cosine_cost, transport_plan


def test_a_zero_vector_gets_no_gradient():
    """pytorch #184575, F.normalize has a gradient of 1e12 at zero: a dead token would move every weight at once."""
    x = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]]], requires_grad=True)
    cost = cosine_cost(x, torch.eye(3)[None])
    cost.sum().backward()
    assert torch.equal(cost[0, 0], torch.ones(3))  # at right angles to all
    assert torch.equal(x.grad[0, 0], torch.zeros(3)) and 0 < x.grad[0, 1].abs().max() < 1


def test_a_map_of_unit_vectors_gives_a_zero_vector_no_gradient():
    """The same for a map that normalises its inputs to unit length."""
    from pisces_rl.ot.maps import MeanShiftMap

    points = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    fitted = MeanShiftMap(normalise="l2").fit(points, points + 1)
    x = torch.zeros(1, 3, requires_grad=True)
    fitted(x).sum().backward()
    assert x.grad.abs().max() == 0


def test_all_mass_in_one_point_each():
    """POT #552, ot.sinkhorn2 returns nan when using torch.tensor: weights that are zero but for one."""
    cost = torch.tensor([[0, 1, 1, 1.414], [1, 0, 1.414, 1], [1, 1.414, 0, 1], [1.414, 1, 1, 0]], requires_grad=True)
    plan = transport_plan(cost, torch.eye(4)[1], torch.eye(4)[0], reg=0.1)
    plan.value.backward()
    expected = torch.zeros(4, 4)
    expected[1, 0] = 1
    assert torch.allclose(plan.plan, expected) and plan.value.item() == pytest.approx(1)
    assert torch.allclose(cost.grad, expected)


def test_a_divergence_of_near_clouds_is_not_negative():
    """geomloss #24, negative result with SamplesLoss: 50 points in 160 dimensions, .25 apart, away from the origin."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = 0.014 * torch.randn(50, 160, generator=generator) + 10
        y = x + 0.001 * torch.randn(50, 160, generator=generator)
        value, exact = BankDivergence(x, blur=0.05)(y), BankDivergence(x.double(), blur=0.05)(y.double())
        assert exact > 0 and float(value) == pytest.approx(float(exact), rel=1e-2)


def test_weights_count_in_a_divergence():
    """POT #230, mistake in the Sinkhorn divergence implementation: a point of twice the weight is two points."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(4, 2, generator=generator), torch.rand(3, 2, generator=generator)
    weighted = BankDivergence(x, weights=torch.tensor([2.0, 1, 1, 1]), blur=0.1)(y)
    assert float(weighted) == pytest.approx(float(BankDivergence(torch.cat([x[:1], x]), blur=0.1)(y)), rel=1e-4)
