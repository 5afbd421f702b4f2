"""Measure how time and memory of rollout and update grow with the number of tokens, on one GPU, and fit the time.

    python benchmarks/cost.py --json outputs/cost.json                                  # all points, on a GPU
    python benchmarks/cost.py --json outputs/cost.json --minutes 8                      # 8 minutes; repeat to continue
    python benchmarks/cost.py --from outputs/cost.json --figure docs/images/cost.png    # plot existing measurements
    python benchmarks/cost.py --tiny --json outputs/tiny_cost.json                      # the same code on a CPU

The model and phases are those of benchmarks/speed.py, variant `fused`, with guidance (two forward passes per step) and
the whole batch at once in the update. A point is a size, a number of frames, a batch size, what backward recomputes
(`recompute`) and whether the text encoder, VAE and denoiser are kept in host memory (`offload`):
    over frames          each of --frames at each of --sizes with the first of --batch, all but attention recomputed
    at the second of --frames, for each size: each other batch, `nothing` and `everything` recomputed, offload
Points run in this order: a spread of the first kind, then the other points of the first size, then the rest. Times are
ms per sample and denoising step, medians of --repeats runs after one that compiles; tokens are per video. The fit over
the first kind is t = a + b n + c n^2 with n in 1,000 tokens, by least squares of relative errors: b is the part linear
in tokens, c is attention. A phase that does not fit in memory is listed as "out of memory".
"""

import argparse
import gc
import json
import math
import time
from pathlib import Path

import numpy as np
import speed
import torch

from pisces_rl.policy.fast.execution import RECOMPUTE
from pisces_rl.whole_files import write_json

SIZES, FRAMES, BATCHES = ["240x416", "480x832"], [17, 33, 49, 81, 121, 161], [1, 2, 4, 8, 16, 32]
KEYS = ("size", "frames", "batch", "recompute", "offload")  # of a point
TINY = dict(sizes=["16x16", "32x16"], frames=[5, 9, 13, 17], batch=[1, 2])
USUAL = dict(recompute="all_but_attention", offload=False)
STEPS = {"rollout": 2, "update": 1}  # denoising steps of a rollout, trained ones of an update


def tokens_of(point: dict) -> int:
    height, width = map(int, point["size"].split("x"))
    return ((point["frames"] - 1) // 4 + 1) * (height // 16) * (width // 16)


def spread(found: list) -> list:
    """Order items as the first, the last, then those that halve the largest gap."""
    taken = sorted({0, len(found) - 1}) if found else []
    while len(taken) < len(found):
        left, right = max(zip(sorted(taken), sorted(taken)[1:]), key=lambda pair: pair[1] - pair[0])
        taken.append((left + right) // 2)
    return [found[i] for i in taken]


def points_of(args) -> list[dict]:
    curve = spread(
        sorted(
            (
                dict(size=size, frames=frames, batch=args.batch[0], **USUAL)
                for size in args.sizes
                for frames in args.frames
            ),
            key=tokens_of,
        )
    )
    others = []
    for size in args.sizes:
        point = dict(size=size, frames=args.frames[min(1, len(args.frames) - 1)], batch=args.batch[0], **USUAL)
        others.append([point | dict(recompute=name) for name in RECOMPUTE if name != USUAL["recompute"]])
        others[-1] += [point | dict(offload=True), *(point | dict(batch=batch) for batch in args.batch[1:])]
    return curve[:6] + others[0] + curve[6:] + sum(others[1:], [])


def measured(point: dict, args, device: str) -> dict:
    """Return the point with {ms, gib} of each phase that fits in memory."""
    height, width = map(int, point["size"].split("x"))
    work = argparse.Namespace(
        tiny=args.tiny,
        height=height,
        width=width,
        frames=point["frames"],
        batch=point["batch"],
        micro_batch=point["batch"],
        steps=STEPS["rollout"],
    )
    row = point | dict(tokens=tokens_of(point))
    try:
        offload = ("text_encoder", "vae", "denoiser") if point["offload"] else ()
        policy = speed.build("fused", work, device, recompute=point["recompute"], offload=offload)
        roll, update, errors = speed.phases(policy, work)
        for phase, call in (("rollout", roll), ("update", update)):
            call()
            seconds, peak = speed.timed(call, args.repeats, device, warm_up=0)
            milliseconds = 1000 * seconds / point["batch"] / STEPS[phase]
            row[phase] = dict(ms=milliseconds, gib=peak if device == "cuda" else None)
        row["error"] = float(torch.stack(errors).max())
    except torch.OutOfMemoryError:
        row["error"] = None
    return row


def line(row: dict) -> str:
    cells = [
        row["size"],
        row["frames"],
        row["batch"],
        f"{row['tokens']:,}",
        row["recompute"],
        "yes" if row["offload"] else "no",
    ]
    for phase in STEPS:
        found = row.get(phase)
        cells += (
            ["out of memory", "", ""]
            if found is None
            else [f"{found['ms']:.1f}", f"{1000 * found['ms'] / row['tokens']:.2f}", f"{found['gib'] or math.nan:.2f}"]
        )
    return f"| {' | '.join(map(str, cells))} | {'' if row['error'] is None else format(row['error'], '.1e')} |"


def curve(rows: list[dict], phase: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens (in 1,000) and ms of the points over frames that fit in memory."""
    usual = [row for row in rows if phase in row and all(row[key] == value for key, value in USUAL.items())]
    own = sorted(
        (row["tokens"] / 1000, row[phase]["ms"]) for row in usual if row["batch"] == min(row["batch"] for row in usual)
    )
    return np.array([n for n, _ in own]), np.array([ms for _, ms in own])


def fitted(n: np.ndarray, ms: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Return (a, b, c) of t = a + b n + c n^2 and the RMS relative error; None for fewer than 4 points."""
    if len(n) < 4:
        return None
    terms = np.stack([np.ones_like(n), n, n**2], 1) / ms[:, None]
    found = np.linalg.lstsq(terms, np.ones_like(n), rcond=None)[0]
    return found, float(np.sqrt(np.mean((terms @ found - 1) ** 2)))


def figure(rows: list[dict], path: Path) -> None:
    """Plot ms per 1,000 tokens against tokens per video with the fit, and peak GiB against tokens at a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for phase, colour in zip(STEPS, ("tab:blue", "tab:orange")):
        n, ms = curve(rows, phase)
        left.plot(1000 * n, ms / n, "o", color=colour, label=phase)
        fit = fitted(n, ms)
        if fit is not None:
            x = np.linspace(n[0], n[-1], 200)
            a, b, c = fit[0]
            left.plot(1000 * x, a / x + b + c * x, color=colour, label=f"{a:.1f} + {b:.2f} n + {c:.3f} n$^2$")
        kinds = sorted({(row["recompute"], row["offload"]) for row in rows})
        for (recompute, offload), marker in zip(kinds, "o^sDvP"):
            own = [
                (row["tokens"] * row["batch"], row[phase]["gib"] or math.nan)
                for row in rows
                if phase in row and (row["recompute"], row["offload"]) == (recompute, offload)
            ]
            label = f"{phase}, recompute {recompute}{', offload' if offload else ''}"
            right.plot([x for x, _ in own], [y for _, y in own], marker, color=colour, label=label, markersize=4)
    left.set(xlabel="tokens of a video", ylabel="ms per 1,000 tokens, sample and step", ylim=(0, None))
    right.set(xlabel="tokens at a time (of all videos of the batch)", ylabel="peak GiB", xscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def report(rows: list[dict]) -> None:
    for phase in STEPS:
        fit = fitted(*curve(rows, phase))
        terms = (
            "fewer than 4 points over frames, no fit"
            if fit is None
            else (
                "t = {:.2f} + {:.3f} n + {:.4f} n^2 ms, n in 1,000 tokens; ".format(*fit[0]) + f"residual {fit[1]:.1%}"
            )
        )
        print(f"{phase}: {terms}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few hundred parameters, for a CPU")
    parser.add_argument("--sizes", nargs="+", metavar="HEIGHTxWIDTH", help=" ".join(SIZES))
    parser.add_argument("--frames", nargs="+", type=int, metavar="N", help=f"4 k + 1; {FRAMES}")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help=f"{BATCHES}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no further point after this many minutes"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file to save after each point; existing points are kept"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="read this file instead of measuring")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="needs matplotlib, the extra `study`")
    args = parser.parse_args()
    for name, default in (TINY if args.tiny else dict(sizes=SIZES, frames=FRAMES, batch=BATCHES)).items():
        setattr(args, name, getattr(args, name) or default)
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    machine = f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}"
    known, record = args.source or args.json, dict(machine=machine, rows=[])
    if args.source or known and known.exists():
        record = json.loads(known.read_text(encoding="utf-8"))
    if not args.source and record["machine"] != machine:
        parser.error(
            f"--json={args.json} was measured on {record['machine']}, but this is {machine}; give another file."
        )
    heads = "".join(f"| {phase} ms | per 1,000 tokens | GiB " for phase in STEPS)
    print(f"{record['machine']}\n\n| {' | '.join(KEYS[:3])} | tokens | {' | '.join(KEYS[3:])} {heads}| error |")
    print("|---" * 13 + "|")
    for row in record["rows"]:
        print(line(row))
    start, done = time.perf_counter(), [[row[key] for key in KEYS] for row in record["rows"]]
    left = [] if args.source else [p for p in points_of(args) if [p[key] for key in KEYS] not in done]
    while left and time.perf_counter() - start < 60 * args.minutes:
        record["rows"].append(measured(left.pop(0), args, device))
        print(line(record["rows"][-1]), flush=True)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        if args.json:
            write_json(args.json, record, indent=1)
    print()
    for point in left:
        print(f"not measured within {args.minutes:g} minutes: {', '.join(f'{k} {point[k]}' for k in KEYS)}")
    report(record["rows"])
    if args.figure:
        figure(record["rows"], args.figure)


if __name__ == "__main__":
    main()
