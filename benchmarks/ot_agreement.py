"""How closely plans and divergences agree with other solvers and closed forms: a table of docs/results/ot.md.

python benchmarks/ot_agreement.py                 # CPU
python benchmarks/ot_agreement.py --device cuda   # the fused kernel where it serves
"""

import argparse
import math
import warnings

import numpy as np
import ot
import torch
from geomloss import SamplesLoss
from scipy.optimize import linprog

from pisces_rl.ot import (
    BankDivergence,
    dummy_point_transport_plan,
    partial_transport_plan,
    pisces_plan,
    squared_cost,
    transport_cost,
    transport_plan,
)
from pisces_rl.ot.maps.closed_form import bures_matrix

SHAPES = ((1, 1), (3, 17), (16, 40), (32, 257), (77, 60))
TIGHT = dict(tolerance=1e-10, max_iterations=200_000)


def problems(dtype: torch.dtype, device: str, seed: int):
    for k, (n, m) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(100 * seed + k)
        cost = torch.rand(3, n, m, generator=generator, dtype=torch.float64)
        a, b = (torch.rand(3, size, generator=generator, dtype=torch.float64) + 0.02 for size in (n, m))
        a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        yield tuple(x.to(dtype).to(device) for x in (cost, a, b))


def largest(pairs) -> float:
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def per_problem(cost, a, b, solve):
    arrays = [x.double().cpu().numpy() for x in (cost, a, b)]
    return np.stack([solve(w / w.sum(), v / v.sum(), c) for c, w, v in zip(*arrays)])


def balanced(dtype, device, reg, seeds):
    options = TIGHT if dtype == torch.float64 else {}
    for seed in range(seeds):
        for cost, a, b in problems(dtype, device, seed):
            theirs = per_problem(
                cost,
                a,
                b,
                lambda w, v, c: ot.sinkhorn(w, v, c, reg, method="sinkhorn_log", stopThr=1e-12, numItermax=200_000),
            )
            yield transport_plan(cost, a, b, reg=reg, **options).plan.double().cpu(), theirs


def padded(dtype, device, seeds):
    for seed in range(seeds):
        for cost, a, b in problems(dtype, device, seed):
            wide = torch.nn.functional.pad(cost, (0, 9, 0, 5), value=math.nan)
            weights = torch.nn.functional.pad(a, (0, 5)), torch.nn.functional.pad(b, (0, 9))
            plan = transport_plan(wide, *weights, reg=0.05).plan[:, : cost.shape[1], : cost.shape[2]]
            yield plan.double().cpu(), transport_plan(cost, a, b, reg=0.05).plan.double().cpu()


def unbalanced(dtype, device, reg, reach, seeds):
    options = TIGHT if dtype == torch.float64 else {}
    for seed in range(seeds):
        for cost, a, b in problems(dtype, device, seed):
            theirs = per_problem(
                cost,
                a,
                b,
                lambda w, v, c: ot.unbalanced.sinkhorn_unbalanced(
                    w, v, c, reg, reach, reg_type="kl", numItermax=100_000, stopThr=1e-14
                ),
            )
            yield transport_plan(cost, a, b, reg=reg, reach=reach, **options).plan.double().cpu(), theirs


def partial_uniform(dtype, device, reg, mass, seeds):
    options = TIGHT if dtype == torch.float64 else {}
    for seed in range(seeds):
        for cost, a, b in problems(dtype, device, seed):
            theirs = per_problem(
                cost,
                a,
                b,
                lambda w, v, c: ot.partial.entropic_partial_wasserstein(
                    w, v, c, reg, m=mass, numItermax=100_000, stopThr=1e-15
                ),
            )
            plan = partial_transport_plan(cost, a, b, mass=mass, reg=reg, reference="uniform", **options).plan
            yield plan.double().cpu(), theirs


def dummy(dtype, device, reg, mass, seeds):
    options = TIGHT if dtype == torch.float64 else {}

    def extended(w, v, c):
        cost = np.pad(c, ((0, 1), (0, 1)))
        cost[-1, -1] = 1e3
        return ot.sinkhorn(
            np.append(w, 1 - mass),
            np.append(v, 1 - mass),
            cost,
            reg,
            method="sinkhorn_log",
            stopThr=1e-13,
            numItermax=200_000,
        )[:-1, :-1]

    for seed in range(seeds):
        for cost, a, b in problems(dtype, device, seed):
            plan = dummy_point_transport_plan(cost, a, b, mass=mass, reg=reg, **options).plan
            yield plan.double().cpu(), per_problem(cost, a, b, extended)


def published(device):
    for cost, a, b in problems(torch.float64, device, 0):
        a, b = torch.full_like(a, 1 / a.shape[1]), torch.full_like(b, 1 / b.shape[1])
        plan = pisces_plan(cost, a, b, mass=0.9, reg=0.05, tolerance=1e-13, max_iterations=20_000).plan
        other = transport_plan(cost, a, b, reg=0.05, reach=0.45, **TIGHT).plan
        yield (plan / plan.sum(2, keepdim=True)).cpu(), (other / other.sum(2, keepdim=True)).cpu()


def programme(device, partial):
    for cost, a, b in problems(torch.float64, device, 0):
        for k in range(3 if cost[0].numel() < 1000 else 0):
            n, m = cost[k].shape
            rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
            both, limits = np.vstack([rows, columns]), np.concatenate([a[k].cpu().numpy(), b[k].cpu().numpy()])
            c = cost[k].cpu().numpy().ravel()
            if partial:
                exact = linprog(c, A_ub=both, b_ub=limits, A_eq=np.ones((1, n * m)), b_eq=[0.6]).fun
                plan = partial_transport_plan(
                    cost[k], a[k], b[k], mass=0.6, reg=1e-4, tolerance=1e-6, max_iterations=200_000
                ).plan
            else:
                exact = linprog(c, A_eq=both, b_eq=limits).fun
                plan = transport_plan(cost[k], a[k], b[k], reg=1e-4, tolerance=1e-6, max_iterations=200_000).plan
            yield float(transport_cost(cost[k], plan)), exact


def sorting(device):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.rand(12, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        cost = squared_cost(x, y).to(device)
        plan = transport_plan(cost, reg=1e-5, tolerance=1e-6, max_iterations=200_000).plan
        yield float(transport_cost(cost, plan)), float((x.sort(0).values - y.sort(0).values).square().mean() / 2)


def two_points(device):
    for c in (0.01, 0.3, 2.0):
        cost = torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64, device=device)
        plan = transport_plan(cost, reg=0.1, tolerance=1e-13).plan
        yield float(plan[0, 0]), 0.5 / (1 + math.exp(-c / 0.1))


def bures():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        s, t = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        s, t = s @ s.T + 0.1 * torch.eye(8), t @ t.T
        matrix = bures_matrix(s.double(), t)
        distance = float((s + t - 2 * matrix @ s).trace())
        yield distance, ot.gaussian.bures_wasserstein_distance(np.zeros(8), np.zeros(8), s.numpy(), t.numpy()) ** 2


def differences(device):
    for kind in (
        lambda c: transport_plan(c, reg=0.1, **TIGHT),
        lambda c: transport_plan(c, reg=0.1, reach=0.3, **TIGHT),
        lambda c: partial_transport_plan(c, mass=0.6, reg=0.1, **TIGHT),
        lambda c: dummy_point_transport_plan(c, mass=0.6, reg=0.1, **TIGHT),
    ):
        generator = torch.Generator().manual_seed(0)
        cost, way = (torch.rand(2, 5, 7, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
        cost.requires_grad_()
        (gradient,) = torch.autograd.grad(kind(cost).value.sum(), cost)
        with torch.no_grad():
            numeric = (kind(cost + 1e-5 * way).value - kind(cost - 1e-5 * way).value).sum() / 2e-5
        yield float((gradient * way).sum()), float(numeric)


def divergences(device):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(8, 16, generator=generator, dtype=torch.float64) + 0.3).to(device).requires_grad_()
        bank = torch.randn(100, 16, generator=generator, dtype=torch.float64).to(device)
        ours = BankDivergence(bank, blur=3.0, **TIGHT)(x)
        loss = SamplesLoss("sinkhorn", p=2, blur=3.0, debias=True, diameter=20.0, scaling=0.9999, backend="tensorized")
        theirs = loss(x, bank)
        gradients = [torch.autograd.grad(v, x)[0] for v in (ours, theirs)]
        yield float(ours) / float(theirs), 1.0
        yield float((gradients[0] - gradients[1]).norm() / gradients[1].norm()), 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    device, seeds = args.device, args.seeds
    warnings.simplefilter("error", RuntimeWarning)
    double, single = torch.float64, torch.float32
    rows = [("plan, fp64 to 1e-10, eps 1, against POT sinkhorn_log", balanced(double, device, 1.0, seeds))]
    for reg in (0.05, 0.01, 0.001):
        rows += [(f"plan, fp64 to 1e-10, eps {reg}, against POT sinkhorn_log", balanced(double, device, reg, seeds))]
    for reg in (1.0, 0.05, 0.01, 0.001):
        rows += [(f"plan, fp32 to 1e-5, eps {reg}, against POT sinkhorn_log", balanced(single, device, reg, seeds))]
    rows += [
        ("plan, fp32, padded with NaN against unpadded", padded(single, device, seeds)),
        ("unbalanced, fp64, eps .05, rho .2, against POT", unbalanced(double, device, 0.05, 0.2, seeds)),
        ("unbalanced, fp32, eps .05, rho .2, against POT", unbalanced(single, device, 0.05, 0.2, seeds)),
        (
            "partial, uniform reference, fp64, eps .05, m .6, against POT",
            partial_uniform(double, device, 0.05, 0.6, seeds),
        ),
        ("partial, dummy point, fp64, eps .05, m .6, against POT's extended", dummy(double, device, 0.05, 0.6, seeds)),
        ("partial, dummy point, fp32, eps .05, m .6, against POT's extended", dummy(single, device, 0.05, 0.6, seeds)),
        ("published iteration, row-normalised, against unbalanced", published(device)),
        ("cost at eps 1e-4 against SciPy's linear programme", programme(device, False)),
        ("partial cost at eps 1e-4 against SciPy's linear programme", programme(device, True)),
        ("1-D cost at eps 1e-5 against sorting", sorting(device)),
        ("two points, closed form", two_points(device)),
        ("Gaussians: Bures distance of the linear map against POT", bures()),
        ("gradient in costs against finite differences (4 kinds)", differences(device)),
        ("divergence and its gradient, relative, against SamplesLoss at scaling .9999", divergences(device)),
    ]
    print("| problem class | instances | largest error |\n|---|---|---|")
    for name, pairs in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pairs = list(pairs)
        print(f"| {name} | {len(pairs)} | {largest(pairs):.1e} |", flush=True)


if __name__ == "__main__":
    main()
