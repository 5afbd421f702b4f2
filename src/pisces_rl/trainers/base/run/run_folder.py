"""Files that a run writes besides checkpoints and adapter: evaluations, samples, a report."""

import json

from torch import Tensor

from .... import media
from ....run_files import RunFiles
from ....whole_files import write_json
from .report import compare, markdown_comparison


def write_samples(
    files: RunFiles, name: str, videos: Tensor, prompts: list[str], scores: dict[str, list], fps: float
) -> None:
    """Write mp4 files of (B, F, 3, H, W) videos, a contact sheet with the first score, and rewards.json.

    They go to the subfolder `name` of the run's folder and replace what the run wrote there before.
    """
    clips = [f"{row:03d}.mp4" for row in range(len(videos))]
    written = [*clips, "sheet.png", "sheet.captions.txt", "rewards.json"]
    files.claim(*(f"{name}/{file}" for file in written))
    folder = files.folder / name
    for path in [
        path for path in files.own if path.startswith(f"{name}/") and path.removeprefix(f"{name}/") not in written
    ]:
        (files.folder / path).unlink(missing_ok=True)
    for video, clip in zip(videos, clips):
        media.save_video(video, folder / clip, fps=fps)
    media.contact_sheet(videos, prompts, folder / "sheet.png", scores=next(iter(scores.values())))
    write_json(folder / "rewards.json", {"prompts": prompts, "scores": scores})


def evaluation_file(step: int) -> str:
    return f"evaluations/step_{step:06d}.json"


def first_evaluation(files: RunFiles, last: dict, before_step: int) -> tuple[int, dict]:
    """Return the step of a run's first evaluation, and its datasets that `last` also has with the same prompts.

    The datasets are empty unless the first evaluation was before `before_step`.
    """
    paths = sorted((path for path in files.current() if path.startswith("evaluations/")), key=lambda p: (len(p), p))
    if not paths:
        return before_step, {}
    first = json.loads((files.folder / paths[0]).read_text(encoding="utf-8"))
    if first["step"] >= before_step:
        return first["step"], {}
    return first["step"], {
        name: part
        for name, part in first["sets"].items()  # the run may have been resumed with other datasets
        if name in last and part["prompts"] == last[name]["prompts"]
    }


def write_report(
    files: RunFiles, steps: tuple[int, int], before: dict, after: dict, videos: dict[str, tuple[Tensor, Tensor]]
) -> dict:
    """Write report.json, report.md, and sheets of videos side by side; return the comparison.

    Args:
        files: files of the run's folder.
        steps: optimizer steps of the evaluations `before` and `after`.
        before: the first evaluation, as in `compare`.
        after: the last evaluation.
        videos: {dataset: (videos before training, videos after training)}.
    """
    folder, comparison = files.folder, compare(before, after)
    files.claim(
        "report.json",
        "report.md",
        *(f"samples/before_after_{name}.{kind}" for name in videos for kind in ("png", "captions.txt")),
    )
    write_json(folder / "report.json", {"from_step": steps[0], "to_step": steps[1], "comparison": comparison})
    (folder / "report.md").write_text(markdown_comparison(comparison), encoding="utf-8")
    for name, (base, trained) in videos.items():
        first, last = (
            {"prompts": part[name]["prompts"], "reward": part[name]["scores"]["reward"]} for part in (before, after)
        )
        count = len(base)
        media.before_after_sheet(
            base,
            trained,
            first["prompts"][:count],
            folder / "samples" / f"before_after_{name}.png",
            before_scores=first["reward"][:count],
            after_scores=last["reward"][:count],
        )
    return comparison
