"""The parts of benchmarks/token_scores.py: a caption's structure, the plan, and the structure's cost."""

import importlib
from pathlib import Path

import pytest
import torch

from pisces_rl.rewards.encoders import load_encoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("token_scores")


@pytest.mark.parametrize(
    ("caption", "groups", "direction"),
    [
        ("a red circle moving left", [0, 0, 0, 0, 0], (0, 0)),
        ("a circle to the left of two crosses", [0, 0, -1, -1, -1, -1, 1, 1], (1, 0)),
        (
            "a circle to the right of a cross on a black background",
            [0, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1],
            (-1, 0),
        ),
        ("a circle above a cross moving right", [0, 0, -1, 1, 1, 1, 1], (0, 1)),
        ("a circle below a cross", [0, 0, -1, 1, 1], (0, -1)),
    ],
)
def test_groups_and_relations_come_from_the_caption(script, caption, groups, direction):
    tokenizer = load_encoder("tiny-vtm").tokenizer
    ids = tokenizer(caption, return_tensors="pt").input_ids
    vocabulary = tokenizer.get_vocab()
    found, sign = script.structure(ids, sorted(vocabulary, key=vocabulary.get))
    assert found[0, 1:-1].tolist() == groups and tuple(sign[0].tolist()) == direction


def test_the_plan_keeps_its_marginals(script):
    """Every word's mass is moved, and no token takes more than its share of the capacity."""
    torch.manual_seed(0)
    cost = 2 * torch.rand(3, 7, 20)
    weights = torch.rand(3, 7)
    weights /= weights.sum(1, keepdim=True)
    plans = script.plan(cost, weights, capacity=2.0, steps=500)
    torch.testing.assert_close(plans.sum(2), weights)
    assert (plans.sum(1) <= 2.0 / 20 + 1e-4).all()
    free = script.plan(cost, weights, capacity=100.0)
    torch.testing.assert_close(free, weights[:, :, None] * (-cost / script.EPS).softmax(2))  # attention


@pytest.mark.parametrize("signs", [False, True])
def test_the_structure_s_cost_is_its_sum(script, signs):
    torch.manual_seed(0)
    groups, direction = torch.tensor([[0, 0, -1, 1, 1]]), torch.tensor([[0.0, -1.0]])
    positions = torch.cartesian_prod(torch.arange(1.0), torch.arange(2.0), torch.arange(3.0))
    said, found = script.asked(groups, direction, signs), script.displacements(positions, signs)
    plans = torch.rand(1, 5, 6)
    value = (script.gw_gradient(plans, said, found) * plans).sum()
    total = 0.0
    for (mask, wanted), distance in zip(said, found, strict=True):
        gap = wanted[0][:, :, None, None] - distance[None, None]  # (i, k, j, l)
        total = total + torch.einsum("ik,ikjl,ij,kl->", mask[0], gap.square(), plans[0], plans[0])
    torch.testing.assert_close(value, total)


def test_the_signed_structure_tells_left_from_right(script):
    """Two objects side by side: swapping them changes the signed cost, not that of distances."""
    groups = torch.tensor([[0, 1]])
    positions = torch.tensor([[0.0, 0, 0], [0, 0, 1]])
    straight, swapped = torch.eye(2)[None] / 2, torch.eye(2).flip(0)[None] / 2
    for signs, equal in ((False, True), (True, False)):
        said = script.asked(groups, torch.tensor([[1.0, 0.0]]), signs)
        found = script.displacements(positions, signs)
        costs = [float((script.gw_gradient(p, said, found) * p).sum()) for p in (straight, swapped)]
        assert (costs[0] == costs[1]) is equal and (equal or costs[0] < costs[1])


@pytest.mark.parametrize("kind", ["pooled", "max-sim", "attention", "attention, signs", "plan", "fused GW, signs"])
def test_a_score_has_a_finite_gradient_and_ignores_padding(script, kind):
    torch.manual_seed(0)
    positions = torch.cat([torch.full((1, 3), float("nan")), torch.cartesian_prod(*3 * [torch.arange(2.0)])])
    score = script.TokenScore(kind, 16, positions)
    text = {
        "hidden": torch.randn(2, 6, 16),
        "words": torch.tensor([[0.0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]),
        "groups": torch.tensor([[-1, 0, 0, 1, 1, -1], [-1, 0, 0, -1, -1, -1]]),
        "direction": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    }
    video = torch.randn(2, 9, 16)
    values = score(text, video)
    values.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in score.parameters())
    changed = text["hidden"].clone()
    changed[:, 5] += 1
    torch.testing.assert_close(score(text | {"hidden": changed}, video), values)
