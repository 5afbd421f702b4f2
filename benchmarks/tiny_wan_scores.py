"""Score tiny-wan, or an adapter on it, with the unmodified WanPipeline and ShapeMotion's verifier.

    python benchmarks/tiny_wan_scores.py                                # the shipped model: the table of its README
    python benchmarks/tiny_wan_scores.py --lora outputs/shapemotion_grpo --splits test_seen --steps 8 --guidance 1

Sampling is deterministic flow-Euler. Prompt i of a split always gets the same noise at any batch size, so that models
are compared on paired samples. Intervals are 95 %: 1.96 standard errors of a mean over prompts.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table

from pisces_rl.assets import asset_path, available
from pisces_rl.shapemotion import ALIGNMENT, QUALITY, Verification, load_prompts, verify

SPLITS = ("test_seen", "test_color_shape", "test_shape_motion", "test_both")


@torch.no_grad()
def sample(pipe: WanPipeline, prompts: list[str], steps: int, guidance: float, seed: int, batch: int) -> torch.Tensor:
    """Return (n, 17, 3, 64, 64) float in [0, 1] on the CPU; noise i depends only on the seed and i."""
    videos = []
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        noise = [torch.Generator("cpu").manual_seed(seed * 1_000_003 + first + i) for i in range(len(chosen))]
        frames = pipe(
            chosen,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=24,
            generator=noise,
            output_type="pt",
        ).frames
        videos.append(frames.float().clamp(0, 1).cpu())
    return torch.cat(videos)


def row_of(result: Verification) -> dict:
    """Return means and interval half-widths of the three headline scores, and means of the dimensions."""
    row = {"n": len(result), "dimensions": {}}
    for name in ("correct", "alignment", "quality"):
        values = np.asarray(getattr(result, name), dtype=float)
        row[name] = float(values.mean())
        row[f"{name}_interval"] = float(1.96 * values.std(ddof=1) / len(values) ** 0.5)
    summary = result.summary()
    row["dimensions"] = {name: summary[name] for name in (*ALIGNMENT, *QUALITY) if name in summary}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-wan", help="a built-in model's name, or a folder")
    parser.add_argument("--lora", help="folder of an adapter for it")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS[:3]), choices=SPLITS)
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--n", type=int, default=256, help="prompts per split, at least 2")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--per_dimension", action="store_true", help="a second table")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    path = asset_path(args.model) if args.model in available() else args.model
    pipe = WanPipeline.from_pretrained(path, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    rows, start = [], time.time()
    for split in args.splits:
        prompts = list(load_prompts(split, args.n, args.seed)["prompt"])
        for guidance in args.guidance:
            for steps in args.steps:
                videos = sample(pipe, prompts, steps, guidance, args.seed, args.batch)
                rows.append({"split": split, "steps": steps, "guidance": guidance, **row_of(verify(videos, prompts))})
    show(rows, args.per_dimension, args.lora or args.model)
    print(f"{sum(row['n'] for row in rows)} clips in {time.time() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict], per_dimension: bool, name: str) -> None:
    console = Console()
    table = Table(title=f"{name}: n = {rows[0]['n']} prompts a row", title_justify="left")
    for heading in ("split", "guidance", "steps", "correct", "alignment", "quality"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for row in rows:
        scores = [f"{row[k]:.3f} ± {row[f'{k}_interval']:.3f}" for k in ("correct", "alignment", "quality")]
        table.add_row(row["split"], f"{row['guidance']:g}", str(row["steps"]), *scores)
    console.print(table)
    if not per_dimension:
        return
    for split in dict.fromkeys(row["split"] for row in rows):
        shown = [row for row in rows if row["split"] == split]
        dimensions = Table(title=f"{split}: means over the prompts that ask", title_justify="left")
        dimensions.add_column("dimension", no_wrap=True)
        for row in shown:
            dimensions.add_column(f"guidance {row['guidance']:g}\n{row['steps']} steps", justify="right")
        for dimension in (*ALIGNMENT, *QUALITY):
            values = [row["dimensions"].get(dimension) for row in shown]
            if any(value is not None for value in values):
                dimensions.add_row(dimension, *("" if value is None else f"{value:.3f}" for value in values))
        console.print(dimensions)


if __name__ == "__main__":
    main()
