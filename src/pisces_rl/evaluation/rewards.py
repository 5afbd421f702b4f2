"""Does a reward measure what it claims? Clips with one thing wrong, by how much, and what must change nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from pisces_rl.ot.metrics import Estimate, bootstrap, distance_spearman, mutual_knn, paired_recall
from pisces_rl.shapemotion import (
    SCENE_CORRUPTIONS,
    VIDEO_CORRUPTIONS,
    Layout,
    corrupt,
    lay_out,
    render_layout,
    sample_scenes,
)
from pisces_rl.shapemotion.specs import SceneSpecs

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
OF_ANY_SIZE = ("flicker", "frozen", "time_reversed", "shuffled_frames", "noise", "blur", "uniform_noise")
BATCH = 64


@dataclass
class CleanClips:
    """Prompts, videos (B, F, 3, H, W) in [0, 1] that show them, and for ShapeMotion the scenes and their layout."""

    prompts: list[str]
    videos: Tensor
    scenes: list = field(default_factory=list)
    layout: Layout | None = None

    @staticmethod
    def shapemotion(split: str = "test_seen", n: int = 128, seed: int = 0) -> "CleanClips":
        scenes = sample_scenes(n, split, seed)
        layout = lay_out(SceneSpecs.from_scenes(scenes), torch.Generator().manual_seed(seed))
        return CleanClips([scene.prompt() for scene in scenes], render_layout(layout, size=64), scenes, layout)

    @cached_property
    def pairs(self) -> dict[str, tuple[list[int], Tensor]]:
        """By corruption: the rows that it applies to, and their broken clips.

        Without scenes: another clip of the set, and the corruptions of pixels and of time.
        """
        if self.scenes:
            pairs = {}
            for name in (*SCENE_CORRUPTIONS, *VIDEO_CORRUPTIONS):
                try:
                    pairs[name] = corrupt(name, self.scenes)
                except ValueError:  # no scene names it
                    continue
            return pairs
        rows = list(range(len(self.videos)))
        generator = torch.Generator().manual_seed(0)
        broken = {name: (rows, VIDEO_CORRUPTIONS[name](self.videos, generator)) for name in OF_ANY_SIZE}
        return {"another clip": (rows, self.videos.roll(1, 0)), **broken}


@dataclass
class RewardReport:
    """What `evaluate_reward` found.

    Attributes:
        accuracy: by corruption, how often the clean clip of a prompt scores above the broken one; ties count half.
        falls: by corruption of pixels, minus Spearman's correlation of its strength with the reward, mean over clips.
        curves: by corruption of pixels, the mean reward at each of `STRENGTHS`.
        invariance: the largest change of a reward with its batch-mates, and with a longer prompt in the batch.
        alignment: of a reward with a map: mutual-kNN (k = 10), Spearman of pairwise distances, recall at 1, 5, 10.
        milliseconds: a video. peak_mib: of GPU memory, 0 on a CPU.
    """

    accuracy: dict[str, Estimate]
    falls: dict[str, Estimate]
    curves: dict[str, list[float]]
    invariance: dict[str, float]
    alignment: dict[str, Estimate]
    milliseconds: float
    peak_mib: float

    def __str__(self) -> str:
        lines = ["| corruption | pairs ranked right | falls with strength |", "|---|---|---|"]
        lines += [f"| {name} | {value} | {self.falls.get(name, '')} |" for name, value in self.accuracy.items()]
        lines += ["", "| measure | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.alignment.items()]
        lines += [f"| largest change with {name} | {value:.1e} |" for name, value in self.invariance.items()]
        lines += [f"| ms a video | {self.milliseconds:.2f} |", f"| peak MiB | {self.peak_mib:.0f} |"]
        return "\n".join(lines)


@torch.no_grad()
def evaluate_reward(reward: Callable, clips: CleanClips, device: str | torch.device = "cpu") -> RewardReport:
    """Ask a reward (`pisces_rl.rewards.contract`) about clips whose truth is known. Intervals: bootstrap of clips."""

    def ask(prompts: Sequence[str], videos: Tensor) -> Tensor:
        parts = [
            torch.as_tensor(reward(prompts=list(prompts[i : i + BATCH]), videos=videos[i : i + BATCH].to(device)))
            for i in range(0, len(prompts), BATCH)
        ]
        return torch.cat([part.float().cpu() for part in parts])

    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ask(clips.prompts[:BATCH], clips.videos[:BATCH])  # what the first call compiles or loads is not its speed
    start = time.perf_counter()
    clean = ask(clips.prompts, clips.videos)
    milliseconds = (time.perf_counter() - start) * 1000 / len(clean)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    accuracy, falls, curves = {}, {}, {}
    for name, (rows, broken) in clips.pairs.items():
        prompts = [clips.prompts[row] for row in rows]
        gap = clean[rows] - ask(prompts, broken)
        accuracy[name] = _mean((gap > 0).double() + (gap == 0).double() / 2)
        if name in VIDEO_CORRUPTIONS:
            ends = VIDEO_CORRUPTIONS[name](clips.videos[rows], torch.Generator().manual_seed(0))
            ladder = torch.stack([ask(prompts, torch.lerp(clips.videos[rows], ends, s)) for s in STRENGTHS], 1)
            falls[name] = _mean(torch.tensor([_fall(steps) for steps in ladder.tolist()]))
            curves[name] = ladder.mean(0).tolist()
    return RewardReport(
        accuracy, falls, curves, _invariance(ask, clips), _alignment(reward, clips), milliseconds, peak
    )


def _fall(rewards: list[float]) -> float:
    """-Spearman(strength, reward); a reward that does not move has 0."""
    return 0.0 if max(rewards) == min(rewards) else -float(spearmanr(STRENGTHS, rewards).statistic)


def _mean(values: Tensor) -> Estimate:
    return bootstrap(lambda rows: rows.mean(0), values)


def _invariance(ask: Callable, clips: CleanClips, count: int = 8) -> dict[str, float]:
    prompts, videos = clips.prompts[:count], clips.videos[:count]
    alone = torch.cat([ask([prompt], video[None]) for prompt, video in zip(prompts, videos)])
    longest = max(clips.prompts, key=len)
    with_long = ask([*prompts, longest], torch.cat([videos, videos[:1]]))[: len(prompts)]
    return {
        "batch-mates": float((ask(prompts, videos) - alone).abs().max()),
        "padding": float((with_long - alone).abs().max()),
    }


def _alignment(reward: Callable, clips: CleanClips) -> dict[str, Estimate]:
    """Of text features, mapped if the reward has a map, with those of the videos that show them."""
    encoder = getattr(reward, "encoder", None)
    if encoder is None or not hasattr(reward, "ot_map") or len(clips.prompts) < 40:
        return {}
    texts = [encoder.encode_text(clips.prompts[i : i + BATCH]).pooled for i in range(0, len(clips.prompts), BATCH)]
    video = torch.cat([encoder.encode_video(part).pooled for part in clips.videos.split(BATCH)]).cpu()
    image = torch.cat(texts).cpu()
    image = image if reward.ot_map is None else reward.ot_map(image)
    recall = {f"recall@{k}": value for k, value in paired_recall(image, video).items()}
    return {
        "mutual-kNN (10)": mutual_knn(image, video),
        "Spearman of distances": distance_spearman(image, video),
        **recall,
    }


@torch.no_grad()
def plan_inside_objects(reward, clips: CleanClips) -> dict[str, Estimate]:
    """The share of the words' weight that lies on video tokens with an object: of the plan, of the attention before
    and after fusion, and of the tokens themselves (what a word that knows nothing would have).

    For ShapeMotion's clips of one object, and an `OTSemanticReward` with plans; mean over layers, heads and words.
    """
    rows = [i for i, scene in enumerate(clips.scenes) if sum(group.count for group in scene.groups) == 1]
    if not rows or getattr(reward, "attention", None) is None:
        raise ValueError("clips, reward: expected ShapeMotion's clips of one object, and a reward with plans.")
    layout = clips.layout[torch.tensor(rows)]
    empty = layout[torch.arange(len(rows))]
    empty.present = torch.zeros_like(empty.present)
    shown = (render_layout(layout, size=64) - render_layout(empty, size=64)).abs().amax(2) > 0.02
    prompts, videos = [clips.prompts[i] for i in rows], clips.videos[rows]
    shares: dict[str, list[Tensor]] = {}
    for part in torch.arange(len(rows)).split(BATCH):
        some = [prompts[i] for i in part]
        _, positions, drawings = reward.draw(some, videos[part])
        words = reward.encoder.encode_text(some).words.cpu()
        placed = positions.isfinite().all(1)
        grid = (positions[placed].amax(0) + 1).long().tolist()
        inside = F.adaptive_max_pool3d(shown[part][:, None].float(), grid).flatten(1)[:, None, None]
        for name in ("plan", "attention", "fused"):
            weights = torch.stack(
                [getattr(drawing, name)[..., placed] for drawing in drawings]
            )  # (layers, B, H, N, M)
            share = (weights * inside).sum(-1) / weights.sum(-1).clamp_min(1e-30)
            share = share.mean((0, 2))  # (B, N)
            shares.setdefault(name, []).append((share * words).sum(1) / words.sum(1))
        shares.setdefault("tokens", []).append(inside.mean((1, 2, 3)))
    return {name: _mean(torch.cat(values)) for name, values in shares.items()}
