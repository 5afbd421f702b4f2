"""Samples in wandb and trackio, by the Video, Table and Image that both have."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from transformers import TrainerCallback
from transformers.integrations import TrackioCallback, WandbCallback

_NEEDED = ("log", "Video", "Table", "Image")


def media_trackers(callbacks: Iterable[TrainerCallback]) -> Iterator[ModuleType]:
    """wandb and trackio, where a callback of transformers has begun a run with them; not a version that lacks one of
    log, Video, Table and Image."""
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            tracker = callback._wandb  # None where WANDB_DISABLED says so
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
    """Log TAG/000 and so on, TAG/sheet, and the table TAG/scores of prompts and scores, at a step of training.

    Args:
        tracker: one of `media_trackers`. clips: mp4 files, a prompt each. sheet: a picture. scores: {name: values or
            None, one a prompt}.
    """
    rows = [[row, prompt, *(values[row] for values in scores.values())] for row, prompt in enumerate(prompts)]
    content = {
        f"{tag}/{clip.stem}": tracker.Video(str(clip), caption=prompt, format="mp4")
        for clip, prompt in zip(clips, prompts)
    }
    content[f"{tag}/sheet"] = tracker.Image(str(sheet))
    content[f"{tag}/scores"] = tracker.Table(columns=["video", "prompt", *scores], data=rows, allow_mixed_types=True)
    tracker.log(content | {"train/global_step": step})  # the x-axis of the scalars that the callbacks log
