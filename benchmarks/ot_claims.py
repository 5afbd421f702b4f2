"""The numbers in the running text of docs/ot.md, and the time of a divergence to a large bank (docs/results/ot.md).

python benchmarks/ot_claims.py                                     # a few minutes on a CPU
python benchmarks/ot_claims.py --bank 50000 --dimension 512        # the bank alone, on a GPU if there is one
"""

import argparse
import time
import warnings

import torch
from torch.nn.functional import normalize

from pisces_rl.ot import (
    BankDivergence,
    dummy_point_transport_plan,
    partial_transport_plan,
    pisces_plan,
    transport_plan,
)
from pisces_rl.ot.metrics import default_blur, divergence_from


def three_partial_problems() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(3, 16, 40, generator=generator, dtype=torch.float64)
    for reg in (0.05, 0.01, 0.001):
        settings = dict(mass=0.9, reg=reg, tolerance=1e-8, max_iterations=200_000)
        exact, dummy = (solve(cost, **settings).plan for solve in (partial_transport_plan, dummy_point_transport_plan))
        printed = pisces_plan(cost, mass=0.9, reg=reg).plan
        apart, mass = float((exact - dummy).abs().sum((1, 2)).mean()), float(printed.sum((1, 2)).mean())
        print(f"eps {reg}: dummy point and exact differ in L1 by {apart:.3f}, the published one moves {mass:.2f}")


def nearly_tied() -> None:
    missed = 0
    for seed in range(8):
        cost = torch.rand(32, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        missed += not transport_plan(cost, reg=1e-3, tolerance=1e-6, max_iterations=20_000).converged
    print(f"32 x 64, equal weights, eps .001: {missed} of 8 draws miss 1e-6 after 20,000 iterations")


def small_blur() -> None:
    x, y = (torch.randn(2048, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    collapsed = x * 0 + y.mean(0) + 1e-3 * x
    for label, blur in (("half the mean cost", default_blur(y)), ("a twentieth", default_blur(y) / 10**0.5)):
        same, mean = (divergence_from(points, y, blur=blur).value for points in (x, collapsed))
        print(f"eps {label}: another sample {same:.3g}, all points at the mean {mean:.3g}")


def bank(points: int, dimension: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    real = normalize(torch.randn(points, dimension, generator=generator), dim=1).to(device)
    groups = normalize(torch.randn(4, 8, dimension, generator=generator), dim=2).to(device).requires_grad_()
    for blur in (0.2, 0.5):
        for label in ("bank", "four groups of 8 and their gradient"):
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            if label == "bank":
                divergence = BankDivergence(real, blur=blur)
            else:
                divergence(groups).sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device == "cuda" else ""
            print(f"{points} x {dimension}, blur {blur}, {label}: {time.perf_counter() - start:.3f} s{peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=0, help="points of a bank to time, and nothing else")
    parser.add_argument("--dimension", type=int, default=512)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.bank:
        return bank(args.bank, args.dimension)
    three_partial_problems()
    nearly_tied()
    small_blur()


if __name__ == "__main__":
    main()
