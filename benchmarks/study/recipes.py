"""Read the cells of the study (names, stages and settings) from recipes/study/."""

import re
from pathlib import Path

import yaml

STAGES = "ABCDEF"
RECIPES = Path(__file__).parents[2] / "recipes" / "study"


def cells(stage: str = "") -> list[str]:
    """Names of the cells, of one stage or of all; the first line of a recipe names its stage."""
    paths = [path for path in RECIPES.glob("*.yaml") if path.stem != "shared"]
    first = rf"# Stage {stage or '.'}\."
    return sorted(path.stem for path in paths if re.match(first, path.read_text(encoding="utf-8")))


def settings_of(cell: str) -> dict:
    """What all cells share, what those of its trainer and of its comparison share, and the cell's own settings, later
    ones first."""
    shared, own = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("shared", cell))
    return shared["all"] | shared[own["trainer"]] | shared[own.pop("comparison", "none")] | own
