"""Time batches of balanced plans at equal marginal error with this package and others: tables of docs/results/ot.md.

    python benchmarks/ot_speed.py                    # on the GPU if there is one
    python benchmarks/ot_speed.py --shapes 8x32x513 --device cpu --threads 1 --solvers ours POT
    python benchmarks/ot_speed.py --table solvers    # solver="native" and "geomloss", plans of the semantic reward
    python benchmarks/ot_speed.py --table banks      # the same two solvers, BankDivergence

Costs are 1 - cos of random 64-dimensional points, scaled to [0, 1] per problem; "with cost" includes computing them.
Every solver runs with the fewest iterations for which its L1 marginal error, summed over both sides, is at most the
tolerance in every problem; this package's "native" and "geomloss" solvers stop by themselves. Times are medians of
repeats after a warm-up; with --threads 1 on a CPU, the thread's CPU time, so that other load does not count. Errors
are L1 distances of the plan from an fp64 solution to 1e-11; memory is the peak above the cost. A bank that does not
fit in memory, or would take longer than --seconds, is skipped with its reason; on a CPU it is timed once.
"""

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from geomloss import ot as geomloss_ot
from ot.batch import solve_batch
from torch import Tensor

from pisces_rl.ot import BankDivergence, cosine_cost, transport_plan
from pisces_rl.ot.metrics import default_blur
from pisces_rl.ot.plans import SOLVERS


def build(x: Tensor, y: Tensor) -> Tensor:
    cost = cosine_cost(x, y)
    low, high = cost.aminmax(dim=2)[0].amin(1), cost.aminmax(dim=2)[1].amax(1)
    return (cost - low[:, None, None]) / (high - low)[:, None, None]


def alternating(cost: Tensor, reg: float, iterations: int, step: Callable) -> Tensor:
    """The textbook loop in the log domain, uniform weights."""
    f, g = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    for _ in range(iterations):
        f, g = step(cost, g, reg)
    return ((f[:, :, None] + g[:, None] - cost) / reg).exp() / cost[0].numel()


def log_step(cost: Tensor, g: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    _, n, m = cost.shape
    f = -reg * (((g[:, None] - cost) / reg).logsumexp(2) - torch.log(torch.tensor(float(m), device=cost.device)))
    g = -reg * (((f[:, :, None] - cost) / reg).logsumexp(1) - torch.log(torch.tensor(float(n), device=cost.device)))
    return f, g


def marginal_error(plan: Tensor) -> float:
    _, n, m = plan.shape
    rows, columns = plan.double().sum(2), plan.double().sum(1)
    return float(((rows - 1 / n).abs().sum(1) + (columns - 1 / m).abs().sum(1)).max())


def fewest(solve: Callable[[int], Tensor], tolerance: float, limit: int = 4096) -> int | None:
    """Return the fewest iterations, to about 10 %, that meet the tolerance."""
    count = 1
    while marginal_error(solve(count)) > tolerance:
        count *= 2
        if count > limit:
            return None
    low = count // 2
    while count - low > max(1, count // 10):
        middle = (low + count) // 2
        low, count = (middle, count) if marginal_error(solve(middle)) > tolerance else (low, middle)
    return count


def clock(run: Callable, device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Return the median in milliseconds."""
    times = []
    now = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for i in range(repeats + warmup):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(1e3 * (now() - start))
    return statistics.median(times)


def solvers(reg: float, tolerance: float, step: Callable) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return {name: function of cost and number of iterations}."""

    def geomloss(cost: Tensor, count: int) -> Tensor:
        a, b = weights(cost)
        return geomloss_ot.solve_batch(cost, a=a, b=b, reg=reg, max_iter=count).plan

    return {
        "ours": lambda cost, count: transport_plan(cost, reg=reg, tolerance=tolerance).plan,
        "compiled log-domain loop": lambda cost, count: alternating(cost, reg, count, step),
        "geomloss solve_batch": geomloss,
        "POT solve_batch, sinkhorn": lambda cost, count: pot(cost, reg, count, "sinkhorn"),
        "POT solve_batch, log_sinkhorn": lambda cost, count: pot(cost, reg, count, "log_sinkhorn"),
    }


def measure(solve: Callable, x: Tensor, y: Tensor, count: int, exact: Tensor, repeats: int) -> str:
    """Return a table row's numbers for a solver at its number of iterations."""
    cost = build(x, y)
    plan = solve(cost, count)
    memory = peak(lambda: solve(cost, count), cost.device)
    alone = clock(lambda: solve(cost, count), cost.device, repeats)
    with_build = clock(lambda: solve(build(x, y), count), cost.device, repeats)
    error = float((plan.double() - exact).abs().sum((1, 2)).max())
    return f"{count} | {alone:.2f} | {with_build:.2f} | {marginal_error(plan):.1e} | {error:.1e} | {memory}"


def compare_plans(args: argparse.Namespace, device: torch.device) -> None:
    """Time both solvers of this package, balanced and with the semantic reward's default penalty."""
    headings = "B x N x M, eps, plan, tolerance, solver, iterations, ms, marginal error, plan error, MiB"
    print("| " + headings.replace(", ", " | ") + " |\n" + "|---" * 10 + "|")
    for shape, reg, share, tolerance in itertools.product(args.shapes, args.reg, (None, 0.9), args.tolerance):
        reach = None if share is None else reg * share / (1 - share)
        cost = build(*points(shape, device))
        exact = transport_plan(cost.double(), reg=reg, reach=reach, tolerance=1e-11, max_iterations=20_000).plan
        for solver in SOLVERS:
            solve = partial(transport_plan, cost, reg=reg, reach=reach, tolerance=tolerance, solver=solver)
            plan = solve()
            error = float((plan.plan.double() - exact).abs().sum((1, 2)).max())
            name = "balanced" if reach is None else "unbalanced"
            print(
                f"| {shape} | {reg:g} | {name} | {tolerance:g} | {solver} | {int(plan.iterations.max())} | "
                f"{clock(solve, device, args.repeats):.2f} | {float(plan.marginal_error.max()):.1e} | {error:.1e} | "
                f"{peak(solve, device)} |",
                flush=True,
            )


def compare_banks(args: argparse.Namespace, device: torch.device) -> None:
    """Time both solvers on banks of unit vectors: the bank's self term, then four groups of eight with gradients."""
    headings = "points, blur, solver, ms of the bank, its marginal error, ms of four groups, value, MiB"
    print("| " + headings.replace(", ", " | ") + " |\n" + "|---" * 8 + "|")
    last = {}  # solver -> points and ms of the largest bank so far
    for count, solver in itertools.product(args.banks, SOLVERS):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        bank, groups = (torch.nn.functional.normalize(x, dim=-1) for x in (draw(count, 512), draw(4, 8, 512) + 0.02))
        bank, groups, blur = bank.to(device), groups.to(device).requires_grad_(), default_blur(bank)
        row = f"| {count:,} | {blur:.3g} | {solver} |"
        size, ms = last.get(solver, (count, 0.0))
        expected = ms * (count / size) ** 2 / 1e3
        if expected > args.seconds:
            print(f"{row} skipped: about {expected:.0f} s, more than --seconds | | | | |", flush=True)
            continue
        made = []
        solve = partial(
            lambda into, *args, **options: into.append(BankDivergence(*args, **options)),
            made,
            bank,
            blur=blur,
            solver=solver,
        )
        try:
            took = clock(solve, device, 1, warmup=int(device.type == "cuda"))
        except (ValueError, torch.OutOfMemoryError) as error:
            print(f"{row} skipped: {error} | | | | |", flush=True)
            continue
        last[solver], divergence = (count, took), made[-1]
        both = partial(value_and_gradient, divergence, groups)
        print(
            f"{row} {took:.0f} | {divergence.self_error:.1e} | {clock(both, device, 5):.1f} | "
            f"{float(divergence(groups).mean()):.6f} | {peak(solve, device)} |",
            flush=True,
        )


def value_and_gradient(divergence: BankDivergence, groups: Tensor) -> None:
    torch.autograd.grad(divergence(groups).sum(), groups)


def points(shape: str, device: torch.device) -> tuple[Tensor, Tensor]:
    batch, n, m = (int(s) for s in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(batch, size, 64, generator=generator).to(device) for size in (n, m))
    return x, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", default="others", choices=["others", "solvers", "banks"])
    parser.add_argument("--banks", nargs="+", type=int, default=[1000, 5000, 20_000, 50_000])
    parser.add_argument("--seconds", type=float, default=120, help="skip banks that would take longer")
    parser.add_argument("--shapes", nargs="+", default=["128x32x2049", "64x77x1568"], help="BxNxM")
    parser.add_argument("--reg", nargs="+", type=float, default=[0.05])
    parser.add_argument("--tolerance", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None, help="of the CPU")
    parser.add_argument("--solvers", nargs="+", default=[""], help="only solvers whose names start with these")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}\n")
    if args.table != "others":
        return {"solvers": compare_plans, "banks": compare_banks}[args.table](args, device)
    headings = "B x N x M, eps, tolerance, solver, iterations, ms, ms with cost, marginal error, plan error, MiB"
    print("| " + headings.replace(", ", " | ") + " |\n" + "|---" * 10 + "|")
    step = torch.compile(log_step, dynamic=False)
    for shape, reg, tolerance in itertools.product(args.shapes, args.reg, args.tolerance):
        x, y = points(shape, device)
        cost = build(x, y)
        exact = transport_plan(cost.double(), reg=reg, tolerance=1e-11, max_iterations=20_000).plan
        for label, solve in solvers(reg, tolerance, step).items():
            if not label.startswith(tuple(args.solvers)):
                continue
            if label == "ours":
                count = int(transport_plan(cost, reg=reg, tolerance=tolerance).iterations.max())
            else:
                count = fewest(partial(solve, cost), tolerance)
            figures = "> 4096 | | | | |" if count is None else measure(solve, x, y, count, exact, args.repeats)
            print(f"| {shape} | {reg:g} | {tolerance:g} | {label} | {figures} |", flush=True)


def weights(cost: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(cost[:, :, 0], 1 / cost.shape[1]), torch.full_like(cost[:, 0], 1 / cost.shape[2])


def pot(cost: Tensor, reg: float, iterations: int, method: str) -> Tensor:
    a, b = weights(cost)
    with torch.device(cost.device):  # POT creates its first scaling on the default device
        result = solve_batch(cost, reg=reg, a=a, b=b, max_iter=iterations, tol=1e-12, method=method, grad="detach")
    return result.plan


def peak(run: Callable, device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


if __name__ == "__main__":
    main()
