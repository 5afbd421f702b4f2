"""What a run leaves in its folder beside checkpoints and adapter: evaluations, samples, a report."""

import itertools
import json
import os
from pathlib import Path

from torch import Tensor

from .. import media
from .report import compare, markdown_comparison


def write_json(path: Path, content) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def write_samples(folder: Path, videos: Tensor, prompts: list[str], scores: dict[str, list], fps: float) -> None:
    """mp4 files of (B, F, 3, H, W) videos, a contact sheet with the first of the scores, and rewards.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, video in enumerate(videos):
        media.save_video(video, folder / f"{row:03d}.mp4", fps=fps)
    media.contact_sheet(videos, prompts, folder / "sheet.png", scores=next(iter(scores.values())))
    write_json(folder / "rewards.json", {"prompts": prompts, "scores": scores})


def evaluation_path(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / "evaluations" / f"step_{step:06d}.json"


def first_evaluation(output_dir: str | Path, last: dict, before_step: int) -> tuple[int, dict]:
    """The step of a run's first evaluation, and of it the data sets that `last` has with the same prompts.

    None of them where it was not before `before_step`.
    """
    first = json.loads(sorted((Path(output_dir) / "evaluations").glob("step_*.json"))[0].read_text())
    if first["step"] >= before_step:
        return first["step"], {}
    return first["step"], {name: part for name, part in first["sets"].items()  # an earlier run may have had others
                           if name in last and part["prompts"] == last[name]["prompts"]}


def write_report(output_dir: str | Path, steps: tuple[int, int], before: dict, after: dict,
                 videos: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """report.json, report.md, and sheets of videos side by side; returns the comparison.

    Args:
        steps: of the two evaluations `before` and `after`. videos: {data set: (base model's, trained model's)}.
    """
    folder, comparison = Path(output_dir), compare(before, after)
    write_json(folder / "report.json", {"from_step": steps[0], "to_step": steps[1], "comparison": comparison})
    (folder / "report.md").write_text(markdown_comparison(comparison))
    for name, (base, trained) in videos.items():
        first, last = ({"prompts": part[name]["prompts"], "reward": part[name]["scores"]["reward"]}
                       for part in (before, after))
        count = len(base)
        media.before_after_sheet(
            base, trained, first["prompts"][:count], folder / "samples" / f"before_after_{name}.png",
            before_scores=first["reward"][:count], after_scores=last["reward"][:count],
        )
    return comparison


def earlier_run(output_dir: str | Path) -> list[Path]:
    """Checkpoints and evaluations that are in the folder."""
    return [*Path(output_dir).glob("checkpoint-*"), *Path(output_dir).glob("evaluations")]


def set_aside(output_dir: str | Path, earlier: list[Path]) -> Path:
    """Move an earlier run's files to earlier-N, so that another run does not find them beside its own."""
    output = Path(output_dir)
    number = next(i for i in itertools.count(1) if not (output / f"earlier-{i}").exists())
    aside = output / f"earlier-{number}"
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)
    return aside
