"""`pisces-rl evaluate`: test what rewards measure: whether they detect single corruptions, and how strongly.

Without a dataset, it uses ShapeMotion, where each attribute can be corrupted alone. A dataset needs the columns
`video` (a path) and `caption`; its corruptions are another video of the set and changes to pixels and time. Videos are
scored as they are if all have the same size; otherwise they are scaled and cropped to the encoder's resolution.
Writes rewards.md, reward against corruption strength (strength.png) and transport plans by word (plans.png).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pisces_rl.evaluation import CleanClips, evaluate_reward, plan_inside_objects
from pisces_rl.evaluation.reward_checks import STRENGTHS
from pisces_rl.markdown import escape
from pisces_rl.media import load_video
from pisces_rl.ot.plans import SOLVERS
from pisces_rl.rewards import ENCODER_REWARDS, OTSemanticReward

from .arguments import load_reward_function, parse_arguments, transport_options

COLORS = ("#1b6ca8", "#b3261e", "#127a3a", "#8a5a00", "#6a3d9a", "#444444", "#c2185b", "#00838f", "#7a8b00")


@dataclass
class EvaluationArguments:
    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names in pisces_rl.rewards.REWARDS, file.py:function or package.module:function. Unset: the "
            "ENCODER_REWARDS that the encoder supports."
        },
    )
    encoder: str = field(default="tiny-vtm", metadata={"help": "Built-in encoder, folder or Hub id."})
    ot_map: str | None = field(default=None, metadata={"help": "Folder written by pisces-rl fit-map, for ot_quality."})
    ot_attention: str | None = field(
        default=None,
        metadata={"help": 'OTAttention settings for ot_semantic as JSON, for example {"plan": "partial"}.'},
    )
    ot_solver: str | None = field(
        default=None,
        metadata={"choices": list(SOLVERS), "help": "Solver of plans and of the divergence. Unset: native."},
    )
    dataset: str = field(default="shapemotion", metadata={"help": "shapemotion, or a .csv, .json or .jsonl file."})
    split: str = field(default="test_seen", metadata={"help": "ShapeMotion split."})
    n: int = field(
        default=128, metadata={"help": "Maximum number of clips; they and their corruptions are held in memory."}
    )
    output_dir: str = field(default="outputs/reward_evaluation", metadata={"help": "Folder for tables and images."})


def read_clips(args: EvaluationArguments, frames: int, size: tuple[int, int]) -> CleanClips:
    if args.dataset == "shapemotion":
        return CleanClips.shapemotion(args.split, args.n)
    from datasets import load_dataset

    path = Path(args.dataset)
    kind = "csv" if path.suffix == ".csv" else "json"
    rows = load_dataset(kind, data_files=str(path), split="train")
    rows = list(rows.select(range(min(args.n, len(rows)))))
    videos = [load_video(path.parent / row["video"], frames) for row in rows]
    videos = [video[torch.linspace(0, len(video) - 1, frames).round().long()] for video in videos]  # short ones
    if len({video.shape for video in videos}) > 1:
        videos = [middle(video, size) for video in videos]
    return CleanClips([row["caption"] for row in rows], torch.stack(videos))


def middle(video: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale a video (F, 3, H, W) until it covers `size`, then crop its center."""
    scale = max(side / own for side, own in zip(size, video.shape[-2:]))
    scaled = [round(own * scale) for own in video.shape[-2:]]
    video = torch.nn.functional.interpolate(video, scaled, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((own - side) // 2 for own, side in zip(scaled, size))
    return video[..., top : top + size[0], left : left + size[1]]


def load_rewards(args: EvaluationArguments) -> dict[str, Callable]:
    """Load the requested rewards, or else all that the encoder supports; print why the others are skipped."""
    rewards = {}
    for name, own in transport_options(args, args.rewards or ENCODER_REWARDS).items():
        try:
            rewards[name] = load_reward_function(name, encoder=args.encoder, **own)
        except ValueError as error:
            if args.rewards or own:
                raise
            print(f"{name} is skipped: {error}")
    return rewards


def draw_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw one chart per reward: its mean, scaled from lowest to highest, against the strength of each corruption."""
    width, height, pad = 420, 260, 40
    picture = Image.new("RGB", (width * len(curves), height + 170), "white")
    pen = ImageDraw.Draw(picture)
    for column, (reward, lines) in enumerate(curves.items()):
        left, values = column * width, [value for line in lines.values() for value in line]
        low, high = min(values), max(values)
        pen.text((left + pad, 8), f"{reward}: {low:.3f} to {high:.3f}; strength 0 to 1", fill="black")
        pen.rectangle((left + pad, pad, left + width - 10, height), outline="#cccccc")
        for i, (name, line) in enumerate(lines.items()):
            points = [
                (left + pad + s * (width - pad - 10), height - (value - low) / max(high - low, 1e-9) * (height - pad))
                for s, value in zip(STRENGTHS, line)
            ]
            pen.line(points, fill=COLORS[i % len(COLORS)], width=2)
            pen.text((left + pad, height + 8 + 16 * i), name, fill=COLORS[i % len(COLORS)])
    picture.save(path)


@torch.no_grad()
def draw_plans(reward: OTSemanticReward, clips: CleanClips, path: Path, prompts: int = 3, scale: int = 64) -> None:
    """Draw each word's row of the last layer's plan over the video tokens for a few prompts, averaged over heads."""
    pieces, positions, drawings = reward.draw(clips.prompts[:prompts], clips.videos[:prompts])
    words = reward.encoder.encode_text(clips.prompts[:prompts]).words.cpu()
    placed = positions.isfinite().all(1)
    t, h, w = (positions[placed].amax(0) + 1).long().tolist()
    plan = drawings[-1].plan.mean(1)[..., placed].unflatten(-1, (t, h, w))
    rows = [(i, j) for i in range(len(pieces)) for j in range(len(pieces[i])) if words[i, j]]
    picture = Image.new("RGB", (100 + t * (scale + 4), len(rows) * (scale + 4)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (i, j) in enumerate(rows):
        pen.text((4, row * (scale + 4) + scale // 2), pieces[i][j], fill="black")
        frames = torch.linspace(0, clips.videos.shape[1] - 1, t).round().long()
        small = torch.nn.functional.interpolate(clips.videos[i, frames], (scale, scale))
        heat = plan[i, j] / plan[i, j].amax().clamp_min(1e-30)
        heat = torch.nn.functional.interpolate(heat[:, None], (scale, scale), mode="nearest")
        red = torch.tensor([1.0, 0.2, 0.1])[:, None, None]
        blend = torch.lerp(small * 0.6, red.expand_as(small), 0.7 * heat)
        for k, image in enumerate((blend * 255).byte().permute(0, 2, 3, 1).numpy()):
            picture.paste(Image.fromarray(image), (100 + k * (scale + 4), row * (scale + 4)))
    picture.save(path)


def table_of_shares(shares: dict[str, dict]) -> str:
    """Return a Markdown table: rows for plan, attention, fused attention and tokens; a column per place."""
    lines = [f"| weight of color and noun on | {' | '.join(shares)} |", "|---" * (len(shares) + 1) + "|"]
    for name in next(iter(shares.values())):
        lines.append(f"| {name} | {' | '.join(str(share[name]) for share in shares.values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str], prog: str | None = None) -> None:
    (args,) = parse_arguments(EvaluationArguments, arguments=arguments, prog=prog)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rewards = load_rewards(args)
    encoder = next((rewards[name].encoder for name in ENCODER_REWARDS if name in rewards), None)
    frames, size = (16, (224, 224)) if encoder is None else (encoder.num_frames, encoder.resolution)
    clips = read_clips(args, frames, size)
    sections, curves = [], {}
    for name, reward in rewards.items():
        report = evaluate_reward(reward, clips, device)
        curves[name] = report.curves
        section = f"## {escape(name)}\n\n{report}"
        if isinstance(reward, OTSemanticReward) and reward.attention is not None:
            draw_plans(reward, clips, output / "plans.png")
            if clips.scenes:
                section += f"\n\n{table_of_shares(plan_inside_objects(reward, clips))}"
        sections.append(section)
        print(section, flush=True)
        (output / "rewards.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
        draw_curves(curves, output / "strength.png")
    print(f"wrote {output}")
