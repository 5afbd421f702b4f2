"""Log samples to wandb and trackio, through the Video, Table and Image classes that both have."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from transformers import TrainerCallback
from transformers.integrations import TrackioCallback, WandbCallback

_NEEDED = ("log", "Video", "Table", "Image")


def media_trackers(callbacks: Iterable[TrainerCallback]) -> Iterator[ModuleType]:
    """Yield the modules wandb and trackio if a transformers callback has started a run with them.

    Versions without log, Video, Table or Image are skipped.
    """
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            tracker = callback._wandb  # None if WANDB_DISABLED is set
            begun = tracker is not None and tracker.run is not None
        elif isinstance(callback, TrackioCallback):
            tracker, begun = callback._trackio, callback._initialized
        else:
            continue
        if begun and all(hasattr(tracker, name) for name in _NEEDED):
            yield tracker


def log_samples(
    tracker: ModuleType,
    tag: str,
    clips: Sequence[Path],
    sheet: Path,
    prompts: Sequence[str],
    scores: dict[str, list],
    step: int,
) -> None:
    """Log videos TAG/000, TAG/001, ..., the image TAG/sheet, and the table TAG/scores of prompts and scores.

    Args:
        tracker: a module from `media_trackers`.
        tag: TAG.
        clips: mp4 files, one per prompt.
        sheet: image of the contact sheet.
        prompts: the prompts.
        scores: {name: one value or None per prompt}.
        step: optimizer step.
    """
    rows = [[row, prompt, *(values[row] for values in scores.values())] for row, prompt in enumerate(prompts)]
    content = {
        f"{tag}/{clip.stem}": tracker.Video(str(clip), caption=prompt, format="mp4")
        for clip, prompt in zip(clips, prompts)
    }
    content[f"{tag}/sheet"] = tracker.Image(str(sheet))
    content[f"{tag}/scores"] = tracker.Table(columns=["video", "prompt", *scores], data=rows, allow_mixed_types=True)
    tracker.log(content | {"train/global_step": step})  # the x-axis that the callbacks use for scalars
