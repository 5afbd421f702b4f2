"""Test whether a reward detects single corruptions and their strength, and is invariant to batching and padding."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from pisces_rl.ot.metrics import Estimate, bootstrap, distance_spearman, mutual_knn, paired_recall
from pisces_rl.rewards import RewardPanel
from pisces_rl.shapemotion import (
    SCENE_CORRUPTIONS,
    VIDEO_CORRUPTIONS,
    Layout,
    corrupt,
    lay_out,
    render_layout,
    sample_scenes,
)
from pisces_rl.shapemotion.grammar import COLORS, PLURALS, SHAPES
from pisces_rl.shapemotion.specs import SceneSpecs

if TYPE_CHECKING:
    from pisces_rl.rewards.semantic import OTSemanticReward

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
OF_ANY_SIZE = ("flicker", "frozen", "time_reversed", "shuffled_frames", "noise", "blur", "uniform_noise")
BATCH = 64


@dataclass
class CleanClips:
    """Prompts with matching videos (B, F, 3, H, W) in [0, 1] and, for ShapeMotion, the scenes and their layout."""

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
        """Return {corruption: (the rows it applies to, their corrupted clips)}.

        Without scenes, the corruptions are another clip of the set and changes to pixels and time.
        """
        if self.scenes:
            pairs = {}
            for name in (*SCENE_CORRUPTIONS, *VIDEO_CORRUPTIONS):
                try:
                    pairs[name] = corrupt(name, self.scenes)
                except ValueError:  # it applies to no scene
                    continue
            return pairs
        rows = list(range(len(self.videos)))
        generator = torch.Generator().manual_seed(0)
        broken = {name: (rows, VIDEO_CORRUPTIONS[name](self.videos, generator)) for name in OF_ANY_SIZE}
        return {"another clip": (rows, self.videos.roll(1, 0)), **broken}


@dataclass
class RewardReport:
    """Results of `evaluate_reward`. Clips for which the reward returned None are excluded.

    Attributes:
        accuracy: by corruption, how often a prompt's clean clip scores above the corrupted one; ties count half.
        falls: by pixel corruption, minus Spearman's correlation of its strength with the reward, averaged over clips.
        curves: by pixel corruption, the mean reward at each of `STRENGTHS`.
        invariance: the largest change of a reward with other clips, and with a longer prompt, in the batch.
        alignment: for rewards with a map, mutual-kNN (k = 10), Spearman of pairwise distances, recall at 1, 5, 10.
        milliseconds: time per video.
        peak_mib: peak GPU memory; None on a CPU.
    """

    accuracy: dict[str, Estimate]
    falls: dict[str, Estimate]
    curves: dict[str, list[float]]
    invariance: dict[str, float]
    alignment: dict[str, Estimate]
    milliseconds: float
    peak_mib: float | None

    def __str__(self) -> str:
        lines = ["| corruption | pairs ranked right | falls with strength |", "|---|---|---|"]
        lines += [f"| {name} | {value} | {self.falls.get(name, '')} |" for name, value in self.accuracy.items()]
        lines += ["", "| measure | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.alignment.items()]
        lines += [f"| largest change with {name} | {value:.1e} |" for name, value in self.invariance.items()]
        lines += [f"| ms per video | {self.milliseconds:.2f} |"]
        lines += [] if self.peak_mib is None else [f"| peak MiB | {self.peak_mib:.0f} |"]
        return "\n".join(lines)


@torch.no_grad()
def evaluate_reward(reward: Callable, clips: CleanClips, device: str | torch.device = "cpu") -> RewardReport:
    """Evaluate a reward (`pisces_rl.rewards.contract`) on clips with known content; intervals bootstrap over clips.

    Args:
        reward: the reward.
        clips: the clean clips.
        device: the device that the videos are passed on.

    Raises:
        ValueError: the reward returned None for every clip.
        RewardError: the reward failed.
    """
    panel = RewardPanel(reward)

    def ask(prompts: Sequence[str], videos: Tensor) -> Tensor:
        """Return the rewards (n,), NaN for those that are None."""
        parts = [
            panel(list(prompts[i : i + BATCH]), videos[i : i + BATCH].to(device), {}).values[:, 0]
            for i in range(0, len(prompts), BATCH)
        ]
        return torch.cat(parts)

    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ask(clips.prompts[:BATCH], clips.videos[:BATCH])  # warm up: exclude compilation and loading from the timing
    start = time.perf_counter()
    clean = ask(clips.prompts, clips.videos)
    milliseconds = (time.perf_counter() - start) * 1000 / len(clean)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    if clean.isnan().all():
        raise ValueError(f"reward: {panel.names[0]!r} returned None for every clip.")
    accuracy, falls, curves = {}, {}, {}
    for name, (rows, broken) in clips.pairs.items():
        prompts = [clips.prompts[row] for row in rows]
        gap = clean[rows] - ask(prompts, broken)
        gap = gap[gap.isfinite()]
        if not len(gap):
            continue
        accuracy[name] = _mean((gap > 0).double() + (gap == 0).double() / 2)
        if name in VIDEO_CORRUPTIONS:
            ends = VIDEO_CORRUPTIONS[name](clips.videos[rows], torch.Generator().manual_seed(0))
            ladder = torch.stack([ask(prompts, torch.lerp(clips.videos[rows], ends, s)) for s in STRENGTHS], 1)
            ladder = ladder[ladder.isfinite().all(1)]
            falls[name] = _mean(torch.tensor([_fall(steps) for steps in ladder.tolist()]))
            curves[name] = ladder.mean(0).tolist()
    return RewardReport(
        accuracy, falls, curves, _invariance(ask, clips), _alignment(reward, clips), milliseconds, peak
    )


def _fall(rewards: list[float]) -> float:
    """Return -Spearman(strength, reward), or 0 for a constant reward."""
    return 0.0 if max(rewards) == min(rewards) else -float(spearmanr(STRENGTHS, rewards).statistic)


def _mean(values: Tensor) -> Estimate:
    return bootstrap(lambda rows: rows.mean(0), values)


def _invariance(ask: Callable, clips: CleanClips, count: int = 8) -> dict[str, float]:
    prompts, videos = clips.prompts[:count], clips.videos[:count]
    alone = torch.cat([ask([prompt], video[None]) for prompt, video in zip(prompts, videos)])
    longest = max(clips.prompts, key=len)
    with_long = ask([*prompts, longest], torch.cat([videos, videos[:1]]))[: len(prompts)]
    return {"batch-mates": _change(ask(prompts, videos), alone), "padding": _change(with_long, alone)}


def _change(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute change: infinite if only one value is NaN, 0 if both are."""
    alike = one.isnan() & other.isnan()
    return float((one - other).abs().nan_to_num(torch.inf).masked_fill(alike, 0).max())


def _alignment(reward: Callable, clips: CleanClips) -> dict[str, Estimate]:
    """Return the alignment of text features, mapped if the reward has a map, with features of the matching videos."""
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
def plan_inside_objects(reward: "OTSemanticReward", clips: CleanClips) -> dict[str, dict[str, Estimate]]:
    """Measure where an object's color and noun attend: the share of their weight on video tokens that show the object.

    Shares are computed for the plan, for the attention before and after fusion, and for the tokens themselves (the
    share of uniform attention). A token shows an object if any of its frames does at that place. Places are "one
    object" for clips with one group, and "its own of two" and "the other of two" for clips with two. Values are means
    over fused layers, heads, words and groups.

    Args:
        reward: an `OTSemanticReward` with plans.
        clips: clips of ShapeMotion.

    Returns:
        {place: {"plan", "attention", "fused" or "tokens": share}}.

    Raises:
        ValueError: the clips have no scenes, or the reward has no plans.
    """
    if not clips.scenes or getattr(reward, "attention", None) is None:
        raise ValueError("clips, reward: expected ShapeMotion clips and a reward with plans.")
    shares: dict[str, dict[str, list[Tensor]]] = {}
    for groups in (1, 2):
        rows = [i for i, scene in enumerate(clips.scenes) if len(scene.groups) == groups]
        for part in torch.tensor(rows).split(BATCH) if rows else ():
            pieces, positions, drawings = reward.draw([clips.prompts[i] for i in part], clips.videos[part])
            named = torch.tensor([_naming_words(row, groups) for row in pieces])  # (B, groups, N)
            placed = positions.isfinite().all(1)
            grid = (positions[placed].amax(0) + 1).long().tolist()
            shown = reward.encoder.padded(reward.encoder.sample(_shown(clips, part, groups)))
            shown = F.adaptive_max_pool3d(shown.transpose(1, 2).float(), grid).flatten(2)  # (B, groups, M)
            for name in ("plan", "attention", "fused"):
                weights = torch.stack([getattr(drawing, name)[..., placed] for drawing in drawings])
                share = weights @ shown.mT[:, None] / weights.sum(-1, keepdim=True).clamp_min(1e-30)
                share = share.mean((0, 2))  # (layers, B, heads, N, groups) to (B, N, groups)
                own = named / named.sum(2, keepdim=True) @ share  # (B, groups of the words, groups of the tokens)
                for where, values in _by_place(own).items():
                    shares.setdefault(where, {}).setdefault(name, []).append(values)
            for where, values in _by_place(shown.mean(2)[:, None].expand(-1, groups, -1)).items():
                shares[where].setdefault("tokens", []).append(values)
    return {
        where: {name: _mean(torch.cat(values)) for name, values in kinds.items()} for where, kinds in shares.items()
    }


def _by_place(share: Tensor) -> dict[str, Tensor]:
    """Split shares (B, groups of the words, groups of the tokens) by place, each (B,)."""
    if share.shape[1] == 1:
        return {"one object": share[:, 0, 0]}
    return {
        "its own of two": share.diagonal(dim1=1, dim2=2).mean(1),
        "the other of two": share.flip(2).diagonal(dim1=1, dim2=2).mean(1),
    }


def _naming_words(pieces: list[str], groups: int) -> list[list[bool]]:
    """For each group of a prompt, mark the pieces that are the group's color or noun; the noun ends a group's name."""
    nouns = (*SHAPES, *PLURALS)
    owner = [sum(piece in nouns for piece in pieces[:i]) for i in range(len(pieces))]
    named = [piece in nouns or piece in COLORS for piece in pieces]
    return [[name and number == group for name, number in zip(named, owner)] for group in range(groups)]


def _shown(clips: CleanClips, rows: Tensor, groups: int) -> Tensor:
    """Return masks (B, F, groups, H, W) of the pixels of each group of objects."""

    layout = clips.layout[rows]  # type: ignore[index]  # clips with objects have one
    first = torch.tensor([clips.scenes[i].groups[0].count for i in rows])[:, None]
    slot = torch.arange(layout.present.shape[1])
    empty = replace(layout, present=torch.zeros_like(layout.present))
    background, shown = render_layout(empty, size=64), []
    for group in range(groups):
        alone = replace(layout, present=layout.present & ((slot >= first) == bool(group)))
        shown.append((render_layout(alone, size=64) - background).abs().amax(2) > 0.02)
    return torch.stack(shown, 2)
