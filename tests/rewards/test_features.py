"""Features on disk: broken off and resumed, unpaired, and by two processes; the script that fits a map on them."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Video as VideoFeature
from tiny_encoders import ENCODERS, build

from pisces_rl.cli import fit_map_command
from pisces_rl.media import load_video, save_video
from pisces_rl.rewards import cache_features, features, load_features, load_reward
from pisces_rl.rewards.features import Features as Cached

ROOT = Path(__file__).parents[2]
SHARD = features.SHARD


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD", 4)


def samples(n=11):
    g = torch.Generator().manual_seed(0)
    videos = torch.rand(n, 5, 3, 16, 16, generator=g)
    return [(video, f"a red {'circle' if i % 2 else 'square'} moving left") for i, video in enumerate(videos)]


def cached(encoder, rows, folder, source="random clips", **options):
    return cache_features(encoder, rows, folder, source=source, progress=False, **options)


def lazily(rows, decoded):
    """The same samples, with functions as videos; `decoded` collects the rows of those that were called."""

    def later(row, video):
        return lambda: decoded.append(row) or video

    return [(later(row, video), text) for row, (video, text) in enumerate(rows)]


def test_a_cache_broken_off_goes_on_and_ends_as_a_whole_one(tmp_path):
    encoder = build("tiny_vtm")
    whole = cached(encoder, samples(), tmp_path / "whole", batch_size=3)
    assert whole.text.shape == whole.video.shape == (11, encoder.dimension) and whole.paired
    torch.testing.assert_close(whole.video[7], encoder.encode_video(samples()[7][0][None]).pooled[0])

    def breaking():
        for i, sample in enumerate(samples()):
            if i == 6:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        cached(encoder, breaking(), tmp_path / "parts", batch_size=3)
    assert len(list((tmp_path / "parts").glob("0-*.safetensors"))) == 1
    again = cached(encoder, samples(), tmp_path / "parts", batch_size=3)
    assert torch.equal(again.text, whole.text) and torch.equal(again.video, whole.video)


def test_more_or_fewer_samples_than_before(tmp_path):
    """The last shard of six samples is short, and not the last one of eleven."""
    encoder = build("tiny_vtm")
    for count in (6, 11, 9, 3):
        found = cached(encoder, samples()[:count], tmp_path / "grown")
        fresh = cached(encoder, samples()[:count], tmp_path / str(count))
        torch.testing.assert_close(found.text, fresh.text), torch.testing.assert_close(found.video, fresh.video)
        assert found.paired and len(found.video) == count


def test_what_is_cached_is_not_decoded_again(tmp_path):
    encoder, decoded = build("tiny_vtm"), []
    first = cached(encoder, lazily(samples()[:6], decoded), tmp_path)
    assert decoded == [*range(6)]
    decoded.clear()
    torch.testing.assert_close(cached(encoder, lazily(samples()[:6], decoded), tmp_path).video, first.video)
    assert decoded == []
    cached(encoder, lazily(samples(), decoded), tmp_path)
    assert decoded == [*range(4, 11)]  # the short shard again, and what is new
    decoded.clear()
    fewer = cached(encoder, lazily(samples()[:3], decoded), tmp_path)
    assert fewer.video_rows.tolist() == fewer.text_rows.tolist() == [0, 1, 2]
    assert len(cached(encoder, lazily(samples(), decoded), tmp_path).video) == 11 and decoded == []


def test_of_the_samples_in_memory_a_batch_is_decoded_at_once(tmp_path, monkeypatch):
    encoder, decoded, sizes = build("tiny_vtm"), [], []
    encode = encoder.encode_video
    monkeypatch.setattr(encoder, "encode_video", lambda videos: sizes.append(len(decoded)) or encode(videos))
    cached(encoder, lazily(samples(4), decoded), tmp_path, batch_size=2)
    assert sizes == [2, 4]


def test_videos_of_many_sizes_do_not_fill_the_memory(tmp_path, monkeypatch):
    encoder, decoded, encoded, held = build("tiny_vtm"), [], [], []
    encode = encoder.encode_video
    monkeypatch.setattr(features, "SHARD", 100)
    monkeypatch.setattr(encoder, "encode_video", lambda x: encoded.append(len(x)) or encode(x))
    rows = [(torch.rand(2, 3, 16, 16 + i // 2), None) for i in range(20)] + [(None, "a red circle")]

    def later(row, video):
        return lambda: decoded.append(row) or held.append(len(decoded) - sum(encoded)) or video

    lazy = [(video if video is None else later(row, video), text) for row, (video, text) in enumerate(rows)]
    found = cached(encoder, lazy, tmp_path, batch_size=3)
    assert max(held) <= 6 and sum(encoded) == 20 and found.video_rows.tolist() == [*range(20)]
    assert max(encoded) == 2, "those of one size go together"
    torch.testing.assert_close(found.video[19], encode(rows[19][0][None]).pooled[0])


def test_unpaired_samples_and_sizes_that_differ(tmp_path):
    encoder = build("tiny_vtm")
    mixed = [(None, "a red circle"), (torch.rand(5, 3, 16, 16), None), (torch.rand(4, 3, 20, 16), None)]
    found = cached(encoder, mixed, tmp_path / "mixed")
    assert found.text_rows.tolist() == [0] and found.video_rows.tolist() == [1, 2] and not found.paired
    torch.testing.assert_close(found.video[1], encoder.encode_video(mixed[2][0][None]).pooled[0])
    assert not cached(encoder, mixed[:2], tmp_path / "equally many").paired
    with pytest.raises(ValueError, match="holds no video features"):
        cached(encoder, mixed[:1], tmp_path / "texts")


def test_a_folder_of_another_encoder_or_of_other_samples_is_refused(tmp_path):
    cached(build("tiny_vtm"), samples(5), tmp_path)
    other = build(next(name for name in ENCODERS if name != "tiny_vtm"))
    with pytest.raises(ValueError, match="folder: .* holds features of encoder"):
        cached(other, samples(5), tmp_path)
    with pytest.raises(ValueError, match="holds features of source 'random clips' instead of 'clips.jsonl'; choose"):
        cached(build("tiny_vtm"), samples(5), tmp_path, source="clips.jsonl")


@pytest.mark.slow
def test_two_processes_encode_what_one_does(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, torch
        sys.path.insert(0, {str(ROOT / "tests" / "rewards")!r})
        from accelerate import PartialState
        from test_features import cached, lazily, samples
        from tiny_encoders import build
        from pisces_rl.rewards import features
        features.SHARD = 4
        PartialState(cpu=True)
        torch.manual_seed(0)
        decoded = []
        found = cached(build("tiny_vtm"), lazily(samples(), decoded), {str(tmp_path / "both")!r})
        assert len(found.text) == len(found.video) == 11 and found.paired
        assert decoded == [*range(PartialState().process_index, 11, 2)]
    """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    one, both = cached(build("tiny_vtm"), samples(), tmp_path / "one"), load_features(tmp_path / "both")
    torch.testing.assert_close(both.text, one.text), torch.testing.assert_close(both.video, one.video)


def arguments(tmp_path, rows, *options) -> list[str]:
    """Of `pisces-rl fit-map` on rows of a file of videos and captions, with the shipped encoder."""
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--dataset",
        str(tmp_path / "clips.jsonl"),
        "--output_dir",
        str(tmp_path / "map"),
        "--bank_size",
        "10",
        *options,
    ]


@pytest.fixture
def script():
    """The module of `pisces-rl fit-map`, in this process."""
    return fit_map_command


@pytest.fixture
def fit(tmp_path, script, capsys):
    """What the script prints when it is called in this process."""

    def call(rows, *options) -> str:
        script.main(arguments(tmp_path, rows, *options))
        return capsys.readouterr().out

    return call


def clips(folder, n):
    rows = []
    for i in range(n):
        video = torch.rand(17, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        save_video(video, folder / f"{i}.mp4", min_size=32)
        rows.append({"video": f"{i}.mp4", "caption": f"a {['red', 'blue', 'green'][i % 3]} circle"})
    return rows


def test_the_script_fits_a_map_that_the_reward_loads(tmp_path, fit, monkeypatch):
    monkeypatch.setattr(features, "SHARD", SHARD)
    rows = clips(tmp_path, 24)
    printed = fit(rows)
    assert "Transport does not pay here: use" in printed and "Transport" in (tmp_path / "map" / "maps.md").read_text()
    assert "| identity |" in printed and "24 texts and 24 videos" in printed and "recall@1" in printed
    reward = load_reward("ot_quality", ot_map=tmp_path / "map", divergence_weight=0.1)
    assert reward(["a red circle"], torch.rand(1, 17, 3, 32, 32)).isfinite().all()
    for video in tmp_path.glob("*.mp4"):
        video.unlink()
    # another split of the same features: no video is read; and a map that did not win
    again = fit(rows, "--seed", "1", "--maps", "regressed", "shuffled", "--save", "mean_shift")
    assert "| regressed |" in again and "| shuffled |" in again
    assert load_reward("ot_quality", ot_map=tmp_path / "map").ot_map.kind == "mean_shift"
    with pytest.raises(ValueError, match="holds features of source"):
        fit(rows[1:])
    with pytest.raises(SystemExit, match="2"):
        fit(rows, "--maps", "cubic")


def test_the_script_reads_data_sets_of_videos(tmp_path, script):
    """A folder of videos, as on the Hub, and a table that holds their bytes; neither needs torchcodec."""
    rows = clips(tmp_path / "folder", 3)
    table = [{"file_name": row["video"], "caption": row["caption"]} for row in rows]
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    files = [(tmp_path / "folder" / row["video"]).read_bytes() for row in rows]
    kinds = Features({"video": VideoFeature(decode=False), "caption": Value("string")})
    held = [{"video": {"bytes": file, "path": None}, "caption": row["caption"]} for file, row in zip(files, rows)]
    (tmp_path / "table").mkdir()
    Dataset.from_list(held, features=kinds).to_parquet(tmp_path / "table" / "train.parquet")
    for name in ("folder", "table"):
        read = [*script.samples(script.FitArguments(dataset=str(tmp_path / name)), 5)]
        assert [caption for _, caption in read] == [row["caption"] for row in rows]
        for (video, _), row in zip(read, rows):
            assert torch.equal(video(), load_video(tmp_path / "folder" / row["video"], 5))


def test_the_script_refuses_what_it_cannot_fit_or_save(tmp_path, script, monkeypatch, capsys):
    rows = [{"caption": "a red circle"}, {"caption": "a blue circle"}] * 3
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unpaired = Cached(*torch.rand(2, 20, 128), torch.arange(20), torch.arange(20) + 1)
    monkeypatch.setattr(script, "cache_features", lambda *args, **options: unpaired)
    for options, error, message in (
        (["--maps", "regressed"], ValueError, "maps: regressed needs pairs of a video and a caption"),
        (
            ["--save", "neural"],
            SystemExit,
            "--save 'neural' must be advised, best or one of .*, regressed, entropic",
        ),
    ):
        with pytest.raises(error) as ended:
            script.main(["--output_dir", str(tmp_path / "map"), *options])
        assert re.search(message, capsys.readouterr().err if error is SystemExit else str(ended.value))
        assert not (tmp_path / "map").exists()


def test_the_script_does_not_pair_what_is_only_equally_many(tmp_path, fit):
    rows = clips(tmp_path, 20)
    halves = [{**row, "caption" if i % 2 else "video": None} for i, row in enumerate(rows)]
    printed = fit(halves)
    assert "10 texts and 10 videos" in printed and "recall" not in printed
