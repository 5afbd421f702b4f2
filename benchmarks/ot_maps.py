"""Make the tables of maps in docs/results/ot.md: compare every map with a known one, also on 2,000 points per side.

    python benchmarks/ot_maps.py                          # closed forms and entropic, 20 minutes on two CPU cores
    python benchmarks/ot_maps.py --neural 80              # the neural ones, all at once in 80 s on one GPU
    python benchmarks/ot_maps.py --curve 900              # the published neural map for 900 s, its curve

Problems in 64 dimensions, with fresh points for each seed:
    gaussian   source N(m0, S0), T*(x) = m1 + A (x - m0): the linear map is exact
    nonlinear  source a mixture of six Gaussians, T* the gradient of a convex function: A x + b + sum of sigmoids
    small      nonlinear, with 2,000 points per side; the others have 8,192
L2-UVP is in percent of T*'s variance (0 exact, 100 a constant) on 4,096 unseen points; the divergence is between
mapped and unseen target points; recall@1 is among 1,024. Values are means over seeds, [min, max].
"""

import argparse
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from pisces_rl.ot.divergence import BankDivergence
from pisces_rl.ot.maps import EntropicMap, IdentityMap, LinearMap, MeanShiftMap, NeuralMap
from pisces_rl.ot.maps.closed_form import bures_matrix
from pisces_rl.ot.metrics import default_blur, displacement_cosine, l2_uvp, paired_recall

D = 64
DOUBLE = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Problem:
    """A source, a known map, and points of both that are not paired."""

    def __init__(self, name: str, seed: int):
        self.nonlinear = name != "gaussian"
        self.points = 2000 if name == "small" else 8192
        g = self.generator = torch.Generator().manual_seed(1234 + seed)
        self.source_root, target_covariance = self._root(), self._covariance()
        self.mean, self.target_mean = (0.3 * torch.randn(D, generator=g, dtype=DOUBLE) for _ in range(2))
        self.matrix = bures_matrix(self.source_root @ self.source_root.T, target_covariance)
        self.w = torch.nn.functional.normalize(torch.randn(32, D, generator=g, dtype=DOUBLE), dim=1)
        self.b, self.c = (
            0.5 * torch.randn(32, generator=g, dtype=DOUBLE),
            3 * torch.rand(32, generator=g, dtype=DOUBLE),
        )
        self.centers = torch.randn(6, D, generator=g, dtype=DOUBLE)

    def _covariance(self) -> Tensor:
        q, _ = torch.linalg.qr(torch.randn(D, D, generator=self.generator, dtype=DOUBLE))
        return (q * torch.logspace(0, -1, D, dtype=DOUBLE)) @ q.T

    def _root(self) -> Tensor:
        return torch.linalg.cholesky(self._covariance())

    def source(self, n: int) -> Tensor:
        x = torch.randn(n, D, generator=self.generator, dtype=DOUBLE) @ self.source_root.T + self.mean
        if self.nonlinear:
            x = 0.6 * x + self.centers[torch.randint(0, 6, (n,), generator=self.generator)]
        return x

    def truth(self, x: Tensor) -> Tensor:
        y = (x - self.mean) @ self.matrix.T + self.target_mean
        if self.nonlinear:
            y = 0.3 * y + 1.5 * (torch.sigmoid(5 * (x @ self.w.T + self.b)) * self.c) @ self.w
        return y


PROBE = 30  # timed steps
PLAIN = "entropic, plain"
CLOSED = {
    "identity": IdentityMap,
    "mean shift": MeanShiftMap,
    "linear": LinearMap,
    "entropic on linear": EntropicMap,
    "entropic, debiased": lambda: EntropicMap(linear=False),
}
NEURAL = {
    "neural, as published": lambda: NeuralMap(patience=10**6),
    "neural on linear": lambda: NeuralMap(skip="linear", patience=10**6),
}


def barycentric(source: Tensor, target: Tensor):
    """The plain entropic projection, for comparison: the bias that the debiased map removes."""
    inner = EntropicMap(linear=False).fit(source, target)

    def mapped(x: Tensor) -> Tensor:
        z = inner.tensors["z"].to(x)
        y, g, eps = inner.tensors["y"].to(x), inner.tensors["g"].to(x), float(inner.tensors["eps"])
        assert z.shape[1] == x.shape[1]
        return ((g - (x[:, None] - y[None]).square().sum(2) / 2) / eps).softmax(1) @ y

    return lambda x: torch.cat([mapped(part) for part in x.float().split(64)]).double()


class Data:
    """Points to fit on, and unseen ones with their images."""

    def __init__(self, name: str, seed: int):
        problem = Problem(name, seed)
        self.source, self.target = problem.source(problem.points), problem.truth(problem.source(problem.points))
        self.test = problem.source(4096)
        self.truth, self.unseen = problem.truth(self.test), problem.truth(problem.source(4096))

    def scores(self, map_) -> tuple[float, ...]:
        """Return L2-UVP, cosine, divergence and recall@1."""
        with torch.no_grad():
            mapped = map_(self.test).double()
            unseen, moved = (x.float().to(DEVICE) for x in (self.unseen, mapped))
            divergence = float(BankDivergence(unseen, blur=default_blur(self.unseen), tolerance=1e-4)(moved))
        recall = paired_recall(mapped[:1024], self.truth[:1024])[1].value
        cosine = displacement_cosine(self.test, mapped, self.truth).value
        return l2_uvp(mapped, self.truth).value, cosine, divergence, recall


def measure(task: tuple[str, str, int]) -> tuple[float, ...]:
    """Return the scores and seconds of one map on one problem."""
    name, label, seed = task
    warnings.simplefilter("ignore")
    data = Data(name, seed)
    start = time.perf_counter()
    map_ = barycentric(data.source, data.target) if label == PLAIN else CLOSED[label]().fit(data.source, data.target)
    seconds = time.perf_counter() - start
    return *data.scores(map_), seconds


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_together(tasks: list[tuple[str, str, int]], budget: float) -> list[tuple[float, ...]]:
    """Train neural maps in turn, one step each, on separate streams; return the scores and seconds of each."""
    data = [Data(name, seed) for name, _, seed in tasks]
    streams = [torch.cuda.Stream() if DEVICE == "cuda" else None for _ in tasks]

    def rounds(steps: int, most: int) -> tuple[list[NeuralMap], float]:
        maps_ = [NEURAL[label]() for _, label, _ in tasks]
        for map_ in maps_:
            map_.steps, map_.evaluate_every = steps, max(1, steps // 8)
        runs = [map_._fit_by_steps(d.source, d.target) for map_, d in zip(maps_, data)]
        for i in range(most):
            if i == most - PROBE:
                start = now()
            for run, stream in zip(runs, streams):
                with torch.cuda.stream(stream):
                    next(run, None)
        return maps_, (now() - start) / PROBE

    _, per_round = rounds(10**6, 5 + PROBE)
    steps = max(2 * PROBE, int(0.9 * budget / per_round))
    print(f"{steps} steps each, {per_round / len(tasks) * 1000:.2f} ms a step", flush=True)
    start = now()
    maps_, _ = rounds(steps, steps + 1)
    seconds = (now() - start) / len(tasks)
    return [(*d.scores(map_), seconds) for d, map_ in zip(data, maps_)]


def limited(map_: NeuralMap, budget: float) -> NeuralMap:
    """Measure how many steps fit in the time budget, so that the cosine learning-rate schedule ends with it."""
    points = torch.randn(2000, D)
    probe = NeuralMap(skip=map_.skip)._fit_by_steps(points, points)
    for _ in range(10):
        next(probe)
    start = now()
    for _ in range(PROBE):
        next(probe)
    map_.steps = max(PROBE, int(0.9 * budget * PROBE / (now() - start)))
    map_.evaluate_every = max(1, map_.steps // 20)
    return map_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["gaussian", "nonlinear", "small"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--neural", type=float, default=0, help="seconds for all neural maps; 0 fits the others")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--curve", type=float, default=0, help="seconds of one published neural map, with its curve")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.curve:
        return curve(args)
    labels = list(NEURAL) if args.neural else [*CLOSED, PLAIN]
    rows = [(name, label) for name in args.problems for label in labels]
    tasks = [(*row, seed) for row in rows for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        results = iter(train_together(tasks, args.neural)) if args.neural else pool.map(measure, tasks)
        print("| problem | map | L2-UVP % | cosine | divergence | recall@1 | seconds |\n|---|---|---|---|---|---|---|")
        for name, label in rows:
            columns = torch.tensor([next(results) for _ in range(args.seeds)]).T
            cells = [f"{c.mean():.3g} [{c.min():.3g}, {c.max():.3g}]" for c in columns[:4]]
            print(f"| {name} | {label} | " + " | ".join(cells) + f" | {columns[4].mean():.1f} |", flush=True)


def curve(args) -> None:
    problem = Problem("nonlinear", 0)
    test = problem.source(4096)
    truth = problem.truth(test)
    source, target = problem.source(200_000), problem.truth(problem.source(200_000))
    linear = LinearMap().fit(source, target)
    print(f"linear: L2-UVP {l2_uvp(linear(test), truth)}")
    map_ = limited(NeuralMap(patience=10**6), args.curve)
    held_out = problem.source(1024), problem.truth(problem.source(1024))
    start = time.perf_counter()
    map_.fit(source, target, held_out=held_out, progress=False)
    seconds = time.perf_counter() - start
    bank = BankDivergence(held_out[1].float(), blur=default_blur(held_out[1]))
    base = float(bank(linear(held_out[0]).float()))
    print(f"{map_.steps} steps in {seconds:.0f} s; held-out divergence of the linear map {base:.4g}")
    print("| step | held-out divergence |\n|---|---|")
    for step, value in map_.report["curve"]:
        print(f"| {step} | {value:.4g} |")
    with torch.no_grad():
        mapped = map_(test)
    print(f"neural, as published: L2-UVP {l2_uvp(mapped, truth)}, cosine {displacement_cosine(test, mapped, truth)}")


if __name__ == "__main__":
    main()
