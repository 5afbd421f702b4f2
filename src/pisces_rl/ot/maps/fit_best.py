"""Fit several maps, score all of them on held-out points, and keep the best."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pisces_rl.ot.maps.closed_form import IdentityMap, LinearMap, MeanShiftMap, RegressedMap, ShuffledMap
from pisces_rl.ot.maps.entropic import EntropicMap
from pisces_rl.ot.maps.transport_map import TransportMap
from pisces_rl.ot.metrics import Estimate, bootstrap, default_blur, divergence_from, paired_ranks, paired_recall

BASELINES = ("identity", "mean_shift", "linear")
WITHOUT_TRANSPORT = (IdentityMap, MeanShiftMap, RegressedMap)


UNPAIRED = (
    "Without pairs, held-out data cannot tell whether transport pays: fit on videos with their captions to find out."
)


class MapWarning(UserWarning):
    """A map is no better on held-out data than a simpler one."""


@dataclass(frozen=True)
class BestMap:
    """maps: all, best first. table: name, held-out divergence and, for paired points, recall of each.

    advice: whether transport pays, in one sentence. advised: the map to use by that advice.
    """

    maps: list[TransportMap]
    table: list[dict]
    advice: str
    advised: TransportMap

    @property
    def map(self) -> TransportMap:
        """Return the winner."""
        return self.maps[0]

    def __str__(self) -> str:
        names = list(self.table[0])
        lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        return "\n".join(lines + ["| " + " | ".join(str(row[n]) for n in names) + " |" for row in self.table])


def _same_map(m: TransportMap, other: TransportMap) -> bool:
    """Return whether two maps have the same kind and settings."""
    return type(m) is type(other) and all(getattr(m, name) == getattr(other, name) for name in m.settings)


def fit_best(
    source: Tensor,
    target: Tensor,
    *,
    maps: Sequence[TransportMap] | None = None,
    paired: bool = False,
    held_out: float = 0.2,
    blur: float | None = None,
    seed: int = 0,
    encoder: str = "",
    normalise: str = "none",
) -> BestMap:
    """Return the map with the smallest debiased Sinkhorn divergence between mapped and target points, both held out.

    Identity, mean shift and linear maps are always scored too, and for paired points the regressed map. The winner is
    not refitted on the held-out points, so its scores apply to exactly the map that is returned. Warns (`MapWarning`)
    of every map that does not beat the linear one. A small divergence does not make a map a good reward, so `advise`
    judges paired points by retrieval.

    Args:
        source: points (n, D).
        target: points (m, D).
        maps: unfitted maps. Default: the entropic map on top of the linear one.
        paired: row i of source and target belong together (n = m): they are held out together, and recall at 1, 5 and
            10 is reported. Unpaired transport cannot see a rotation of the whole cloud; recall can.
        held_out: share of the points to hold out.
        blur: of the divergence; default: `metrics.default_blur` of the target.
        seed: of the split.
        encoder: for the baselines, and for `maps` if unset.
        normalise: for the baselines, and for `maps` if unset.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: expected a share in (0, 1).")
    if paired and len(source) != len(target):
        raise ValueError(f"paired: expected equally many points, got {len(source)} and {len(target)}.")
    shared: dict[str, Any] = dict(encoder=encoder, normalise=normalise)
    maps = [EntropicMap(**shared)] if maps is None else list(maps)
    for m in maps:
        if (m.encoder, m.normalise) != (encoder, normalise):
            raise ValueError(
                f"maps: the {m.kind} map has encoder={m.encoder!r} and normalise={m.normalise!r}, the others "
                f"{encoder!r} and {normalise!r}, so their scores are not comparable. Pass the same to fit_best."
            )
    kinds = (IdentityMap, MeanShiftMap, LinearMap, *((RegressedMap,) if paired else ()))
    baselines = [kind(**shared) for kind in kinds]
    baselines = [m for m in baselines if not any(_same_map(m, other) for other in maps)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(source), generator=generator)
    other = order if paired else torch.randperm(len(target), generator=generator)
    cut, other_cut = round(len(source) * (1 - held_out)), round(len(target) * (1 - held_out))
    if min(cut, other_cut, len(source) - cut, len(target) - other_cut) < 2:
        raise ValueError(
            f"held_out={held_out}: leaves fewer than two points of {len(source)} and {len(target)} on a side."
        )
    fit_source, test_source = source[order[:cut]], source[order[cut:]]
    fit_target, test_target = target[other[:other_cut]], target[other[other_cut:]]
    rows, ranks = [], []
    for candidate in (*baselines, *maps):
        candidate.fit(fit_source, fit_target)
        goal = candidate.points("target", test_target)
        with torch.no_grad():
            mapped = candidate(test_source.detach().cpu()).double()
        scale = default_blur(goal) if blur is None else blur
        row = {"map": candidate.kind, "divergence": divergence_from(mapped, goal, blur=scale, seed=seed)}
        if paired:
            row |= {f"recall@{k}": value for k, value in paired_recall(mapped, goal, seed=seed).items()}
            ranks.append((candidate, paired_ranks(mapped, goal)))
        candidate.report["held_out"] = {k: list(v) for k, v in row.items() if isinstance(v, Estimate)}
        rows.append((row, candidate))
    linear = min(row["divergence"].value for row, candidate in rows if candidate.kind == "linear")
    for row, candidate in rows:
        plain = isinstance(candidate, WITHOUT_TRANSPORT) or candidate.kind in BASELINES
        if not plain and row["divergence"].value >= linear:
            warnings.warn(
                f"the {candidate.kind} map does not beat the linear one on held-out points: divergence "
                f"{row['divergence']} against {linear:.4g}. Use the linear map, or more data.",
                MapWarning,
                stacklevel=2,
            )
    rows.sort(key=lambda pair: pair[0]["divergence"].value)
    advice, advised = advise(ranks, seed) if paired else (UNPAIRED, rows[0][1])
    return BestMap([candidate for _, candidate in rows], [row for row, _ in rows], advice, advised)


def advise(ranks: Sequence[tuple[TransportMap, Tensor]], seed: int = 0) -> tuple[str, TransportMap]:
    """Return a sentence that says whether transport pays, and the map to use.

    Half of the held-out pairs choose the best map of either family, with transport and without, by the mean reciprocal
    rank of a text's video. The other half compares the two: transport pays if the 95 % interval of the difference lies
    above 0. Shuffled maps, a control, do not compete.

    Args:
        ranks: each map with the rank (n,) of every held-out pair, see `metrics.paired_ranks`.
        seed: of the interval.
    """

    def best(candidates: list[tuple[TransportMap, Tensor]]) -> tuple[TransportMap, Tensor]:
        return max(candidates, key=lambda pair: float((1 / pair[1][::2]).mean()))

    competing = [(m, rank) for m, rank in ranks if not isinstance(m, ShuffledMap)]
    plain, plain_ranks = best([pair for pair in competing if isinstance(pair[0], WITHOUT_TRANSPORT)])
    transport, transport_ranks = best([pair for pair in competing if not isinstance(pair[0], WITHOUT_TRANSPORT)])
    gain = bootstrap(lambda rows: rows.mean(0), 1 / transport_ranks[1::2] - 1 / plain_ranks[1::2], seed)
    measured = (
        f"mean reciprocal rank on {len(plain_ranks[1::2])} held-out pairs, {transport.kind} minus {plain.kind}: "
        f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    )
    if gain.low > 0:
        return f"Transport pays here: use the {transport.kind} map ({measured}).", transport
    use = "the raw cosine" if isinstance(plain, IdentityMap) else f"the {plain.kind} map, without transport"
    return f"Transport does not pay here: use {use} ({measured}).", plain
