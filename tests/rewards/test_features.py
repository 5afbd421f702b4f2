"""Features on disk: broken off and resumed, unpaired, and by two processes; the script that fits a map on them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_encoders import ENCODERS, build

from pisces_rl.media import save_video
from pisces_rl.rewards import cache_features, features, load_features, load_reward

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD", 4)


def samples(n=11):
    g = torch.Generator().manual_seed(0)
    videos = torch.rand(n, 5, 3, 16, 16, generator=g)
    return [(video, f"a red {'circle' if i % 2 else 'square'} moving left") for i, video in enumerate(videos)]


def test_a_cache_broken_off_goes_on_and_ends_as_a_whole_one(tmp_path):
    encoder = build("tiny_vtm")
    text, video = cache_features(encoder, samples(), tmp_path / "whole", batch_size=3, progress=False)
    assert text.shape == video.shape == (11, encoder.dimension)
    torch.testing.assert_close(video[7], encoder.encode_video(samples()[7][0][None]).pooled[0])

    def breaking():
        for i, sample in enumerate(samples()):
            if i == 6:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        cache_features(encoder, breaking(), tmp_path / "parts", batch_size=3, progress=False)
    assert len(list((tmp_path / "parts").glob("0-*.safetensors"))) == 1
    again = cache_features(encoder, samples(), tmp_path / "parts", batch_size=3, progress=False)
    assert torch.equal(again[0], text) and torch.equal(again[1], video)
    read = cache_features(encoder, samples(), tmp_path / "parts", progress=False)
    assert torch.equal(read[1], video)


def test_unpaired_samples_and_sizes_that_differ(tmp_path):
    encoder = build("tiny_vtm")
    mixed = [(None, "a red circle"), (torch.rand(5, 3, 16, 16), None), (torch.rand(4, 3, 20, 16), None)]
    text, video = cache_features(encoder, mixed, tmp_path, progress=False)
    assert len(text) == 1 and len(video) == 2
    torch.testing.assert_close(video[1], encoder.encode_video(mixed[2][0][None]).pooled[0])
    with pytest.raises(ValueError, match="features of no video"):
        cache_features(encoder, mixed[:1], tmp_path / "texts", progress=False)


def test_a_folder_of_another_encoder_is_refused(tmp_path):
    cache_features(build("tiny_vtm"), samples(5), tmp_path, progress=False)
    other = build(next(name for name in ENCODERS if name != "tiny_vtm"))
    with pytest.raises(ValueError, match="folder: .* holds features of encoder"):
        cache_features(other, samples(5), tmp_path, progress=False)


def test_two_processes_encode_what_one_does(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, torch
        sys.path.insert(0, {str(ROOT / "tests" / "rewards")!r})
        from accelerate import PartialState
        from test_features import samples
        from tiny_encoders import build
        from pisces_rl.rewards import cache_features, features
        features.SHARD = 4
        PartialState(cpu=True)
        torch.manual_seed(0)
        text, video = cache_features(build("tiny_vtm"), samples(), {str(tmp_path / "both")!r}, progress=False)
        assert len(text) == len(video) == 11
    """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    text, video = cache_features(build("tiny_vtm"), samples(), tmp_path / "one", progress=False)
    both = load_features(tmp_path / "both")
    torch.testing.assert_close(both[0], text), torch.testing.assert_close(both[1], video)


def test_the_script_fits_a_map_that_the_reward_loads(tmp_path):
    """From a file of videos and captions, with the shipped encoder."""
    rows = []
    for i in range(24):
        video = torch.rand(17, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        save_video(video, tmp_path / f"{i}.mp4", min_size=32)
        rows.append({"video": f"{i}.mp4", "caption": f"a {['red', 'blue', 'green'][i % 3]} circle"})
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "examples/fit_ot_map.py", "--dataset", str(tmp_path / "clips.jsonl"),
               "--output_dir", str(tmp_path / "map"), "--bank_size", "10"]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| identity |" in done.stdout and "24 texts and 24 videos" in done.stdout
    reward = load_reward("ot_quality", ot_map=tmp_path / "map", divergence_weight=0.1)
    assert reward(["a red circle"], torch.rand(1, 17, 3, 32, 32)).isfinite().all()
    wrong = subprocess.run([*command, "--maps", "cubic"], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert wrong.returncode and "maps: cubic: expected some of" in wrong.stderr
