"""wandb and trackio get videos, sheet and scores of each evaluation by their own means; nothing leaves the machine."""

import json
import sqlite3
from pathlib import Path

import pytest
from trainers.tiny_runs import prompts, trainer

from pisces_rl.trainers.base.watch.trackers import media_trackers


def evaluated(folder: Path, tracker: str, monkeypatch) -> list[str]:
    """A run of one step with an evaluation before and after it; returns the prompts."""
    monkeypatch.chdir(folder)
    data = prompts(2)
    trainer(
        folder / "run",
        data=data,
        eval_dataset=data,
        report_to=tracker,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        num_sample_videos=2,
    ).train()
    return data["prompt"]


def test_wandb_gets_videos_sheet_and_scores(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    try:
        texts = evaluated(tmp_path, "wandb", monkeypatch)
    finally:
        wandb.finish()
    media = next(tmp_path.glob("wandb/offline-run-*/files/media"))
    assert len(list(media.rglob("*.mp4"))) == 4 and len(list(media.rglob("sheet*.png"))) == 2
    tables = [json.loads(path.read_text()) for path in media.rglob("scores*.table.json")]
    assert len(tables) == 2 and all(
        t["columns"] == ["video", "prompt", "reward", "rewards/brightness"] for t in tables
    )
    assert [row[1] for row in tables[0]["data"]] == list(texts)


def test_trackio_gets_videos_sheet_and_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    texts = evaluated(tmp_path, "trackio", monkeypatch)
    folder = tmp_path / "trackio"
    assert len(list(folder.rglob("*.mp4"))) >= 2 and list(folder.rglob("*.png"))
    (database,) = [path for path in folder.rglob("*.db")]
    logged = " ".join(str(row) for row in sqlite3.connect(database).execute("select metrics from metrics"))
    assert "eval/eval/scores" in logged and all(text in logged for text in texts)


def test_other_trackers_are_left_alone():
    """A tracker without a run, without the means, or of another kind."""
    from types import SimpleNamespace

    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    def callback(kind, **attributes):
        made = kind.__new__(kind)  # its package may not be installed
        made.__dict__.update(attributes)
        return made

    whole = {"log": None, "Video": None, "Table": None, "Image": None}
    other = [
        TensorBoardCallback(),
        callback(WandbCallback, _wandb=None),
        callback(WandbCallback, _wandb=SimpleNamespace(run=None, **whole)),
        callback(TrackioCallback, _trackio=SimpleNamespace(**whole), _initialized=False),
        callback(TrackioCallback, _trackio=SimpleNamespace(log=None, Video=None), _initialized=True),
    ]
    assert not list(media_trackers(other))
    wandb = SimpleNamespace(run=1, **whole)
    assert list(media_trackers([*other, callback(WandbCallback, _wandb=wandb)])) == [wandb]
