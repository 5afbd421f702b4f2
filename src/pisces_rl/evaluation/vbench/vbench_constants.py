"""Constants of VBench and VBench-2.0: dimensions, samples per prompt, file names, ranges and weights.

Source: github.com/Vchitect/VBench. Ranges and weights are from scripts/constant.py and
VBench-2.0/scripts/constant.py, totals from cal_final_score.py in the same folders; samples and names are from
prompts/README.md, VBench-2.0/prompts/README.md, vbench/__init__.py and VBench-2.0/vbench2/__init__.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Benchmark:
    """One of the two benchmarks.

    Attributes:
        name: the display name.
        folder: the folder of its reports.
        samples: videos per prompt.
        more_samples: {dimension: videos per prompt}, if not `samples`.
        name_length: how many characters of the prompt a file name keeps; None: all.
        by_dimension: whether the runner expects one folder per dimension.
        groups: {group: {dimension: weight}}.
        group_weights: {group: weight in the total}.
        ranges: {dimension: (min, max)} for dimensions whose score is normalized.
        scales: {dimension: factor} from a video's result to the dimension's score, if not 1.
        invalid: the result of a video that the runner excludes from the mean.
    """

    name: str
    folder: str
    samples: int
    more_samples: dict[str, int]
    name_length: int | None
    by_dimension: bool
    groups: dict[str, dict[str, float]]
    group_weights: dict[str, float]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    invalid: float | None = None

    @property
    def dimensions(self) -> list[str]:
        return [dimension for group in self.groups.values() for dimension in group]

    def normalised(self, dimension: str, score: float) -> float:
        """Return (score - min) / (max - min)."""
        low, high = self.ranges.get(dimension, (0.0, 1.0))
        return (score - low) / (high - low)

    def totals(self) -> dict[str, dict[str, float]]:
        """Return {group or "Total": {dimension: weight of its normalized score}}; each set of weights sums to 1."""
        shares = {
            group: {d: weight / sum(own.values()) for d, weight in own.items()} for group, own in self.groups.items()
        }
        whole = sum(self.group_weights.values())
        total = {
            d: self.group_weights[group] / whole * share for group, own in shares.items() for d, share in own.items()
        }
        return shares | {"Total": total}


_QUALITY = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "aesthetic_quality",
    "imaging_quality",
    "dynamic_degree",
)
_SEMANTIC = (
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)

VBENCH = Benchmark(
    name="VBench",
    folder="vbench",
    samples=5,
    more_samples={"temporal_flickering": 25},
    name_length=None,
    by_dimension=False,
    groups={
        "Quality": dict.fromkeys(_QUALITY, 1.0) | {"dynamic_degree": 0.5},
        "Semantic": dict.fromkeys(_SEMANTIC, 1.0),
    },
    group_weights={"Quality": 4.0, "Semantic": 1.0},
    ranges={
        "subject_consistency": (0.1462, 1.0),
        "background_consistency": (0.2615, 1.0),
        "temporal_flickering": (0.6293, 1.0),
        "motion_smoothness": (0.706, 0.9975),
        "scene": (0.0, 0.8222),
        "appearance_style": (0.0009, 0.2855),
        "temporal_style": (0.0, 0.364),
        "overall_consistency": (0.0, 0.364),
    },
    scales={"imaging_quality": 0.01},  # vbench/imaging_quality.py divides only the mean by 100
)

VBENCH2 = Benchmark(
    name="VBench-2.0",
    folder="vbench2",
    samples=3,
    more_samples={"Diversity": 20},
    name_length=180,
    by_dimension=True,
    groups={
        "Creativity": dict.fromkeys(("Composition", "Diversity"), 1.0),
        "Commonsense": dict.fromkeys(("Instance_Preservation", "Motion_Rationality"), 1.0),
        "Controllability": dict.fromkeys(
            (
                "Camera_Motion",
                "Complex_Landscape",
                "Complex_Plot",
                "Dynamic_Attribute",
                "Dynamic_Spatial_Relationship",
                "Human_Interaction",
                "Motion_Order_Understanding",
            ),
            1.0,
        ),
        "Human Fidelity": dict.fromkeys(("Human_Anatomy", "Human_Clothes", "Human_Identity"), 1.0),
        "Physics": dict.fromkeys(("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"), 1.0),
    },
    group_weights=dict.fromkeys(("Creativity", "Commonsense", "Controllability", "Human Fidelity", "Physics"), 1.0),
    invalid=-1,
)


def benchmark_of(dimensions: Iterable[str], where: str) -> Benchmark:
    """Return the benchmark that has all of these dimensions; raise a ValueError that names `where` if neither does."""
    dimensions = list(dict.fromkeys(dimensions))
    for benchmark in (VBENCH, VBENCH2):
        if dimensions and set(dimensions) <= set(benchmark.dimensions):
            return benchmark
    nearest = max((VBENCH, VBENCH2), key=lambda benchmark: len(set(dimensions) & set(benchmark.dimensions)))
    unknown = [dimension for dimension in dimensions if dimension not in nearest.dimensions]
    raise ValueError(
        f"{where}: {nearest.name} has no dimensions {unknown}, only {nearest.dimensions}. Give "
        "a file of either VBench or VBench-2.0, not of both."
    )
