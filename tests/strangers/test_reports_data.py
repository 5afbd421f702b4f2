"""Public reports on datasets and video files."""

import threading
import time

import pytest
import torch
from datasets import Dataset, DatasetDict
from trainers.tiny_runs import brightness, prompts, trainer

from pisces_rl.media import load_video, save_video
from pisces_rl.trainers.base.setup.checks import check_dataset


def columns_of(folder, data) -> dict:
    """What a reward gets of a dataset."""
    got = {}

    def reward(prompts, videos, trainer_state, log_extra, log_metric, **columns):
        got.update(columns)
        return brightness(prompts, videos)

    trainer(folder, reward, data, max_steps=1, shuffle_dataset=False).train()
    return got


def test_a_format_that_leaves_the_prompt_out(tmp_path):
    """datasets #822, set_format('torch', columns) with text: a bare KeyError."""
    data = prompts(3, n=[1, 2, 3])
    data.set_format("torch", columns=["n"])
    with pytest.raises(ValueError, match=r"format 'torch' with the columns \['n'\], which leaves out `prompt`"):
        trainer(tmp_path, data=data, model="no such model")
    data.set_format("torch", columns=["n"], output_all_columns=True)
    check_dataset("train_dataset", data)


@pytest.mark.parametrize("format", ["torch", "numpy", "pandas"])
def test_a_formatted_data_set(tmp_path, format):
    """datasets #6370, tensor formats and Trainer: texts stay texts, numbers come in the requested format."""
    got = columns_of(tmp_path, prompts(3, n=[1, 2, 3]).with_format(format))
    assert [int(value) for value in got["n"]] == [1] * 4


def test_a_transform_is_called_row_by_row_and_its_columns_arrive(tmp_path):
    """transformers #22119, Trainer removes columns before the transform is called."""
    data = prompts(3, n=[1, 2, 3]).with_transform(
        lambda rows: {"prompt": [text.upper() for text in rows["prompt"]], "twice": [2 * n for n in rows["n"]]}
    )
    assert columns_of(tmp_path, data) == {"twice": [2] * 4}


def test_many_prompts_are_checked_at_once():
    """bergson #167 and datasets #6846, a Column is slow row by row: 100,000 prompts took 8 s, twice."""
    data = Dataset.from_dict({"prompt": [f"clip {i}" for i in range(50_000)]})
    begin = time.process_time()
    check_dataset("train_dataset", data)
    assert time.process_time() - begin < 1


def test_unequal_dicts_in_a_column(tmp_path):
    """datasets #7617, unwanted column padding in nested lists of dicts: Arrow fills in None, and so it arrives."""
    data = prompts(3, spec=[{"a": 1}, {"b": "x"}, None], n=[None, 1, None])
    assert columns_of(tmp_path, data) == {"spec": [{"a": 1, "b": None}] * 4, "n": [None] * 4}


def test_a_dict_of_splits(tmp_path):
    """diffusers #9858, KeyError: 'train': load_dataset without split gives all splits."""
    with pytest.raises(ValueError, match="train_dataset is a DatasetDict; pass a datasets.Dataset"):
        trainer(tmp_path, data=DatasetDict(train=prompts()), model="no such model")
    check_dataset("eval_dataset", DatasetDict(test=prompts()), several=True)


def test_reading_videos_leaves_nothing_open(tmp_path):
    """PyAV #1117, memory leak if a container is not explicitly closed; its decoders have threads."""
    path = save_video(torch.rand(4, 3, 16, 16), tmp_path / "clip.mp4")
    load_video(path)
    threads = threading.active_count()
    open_files = _open_files(path)
    for _ in range(20):
        load_video(path.read_bytes())
        load_video(path, frames=1)
    assert threading.active_count() == threads and _open_files(path) == open_files == 0


def _open_files(path) -> int:
    from pathlib import Path

    return sum(link.resolve() == path for link in Path("/proc/self/fd").iterdir())
