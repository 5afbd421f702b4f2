"""Files made of videos are read back by another reader and compared with what went in."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pisces_rl import media
from pisces_rl.media.encoding import has_encoder


def moving_square(frames=9, height=64, width=64, color=(0.9, 0.2, 0.1)) -> torch.Tensor:
    """(F, 3, H, W): a square that moves right by 3 pixels a frame, on gray."""
    video = torch.full((frames, 3, height, width), 0.5)
    for t in range(frames):
        video[t, :, 20:40, 5 + 3 * t : 25 + 3 * t] = torch.tensor(color)[:, None, None]
    return video


def broken(video: torch.Tensor, frame: int, value: float) -> torch.Tensor:
    """The video with one whole frame of a value that is not finite."""
    return video.index_fill(0, torch.tensor([frame]), value)


def decode(path) -> tuple[np.ndarray, tuple[str, str, float]]:
    """All frames (F, H, W, 3) uint8, and (codec, pixel format, frames per second)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate))


def test_mp4_holds_the_video(tmp_path):
    video = moving_square()
    path = media.save_video(video, tmp_path / "deep" / "clip.mp4", fps=8)
    frames, (codec, pixel_format, rate) = decode(path)
    assert frames.shape == (9, 256, 256, 3)
    assert pixel_format == "yuv420p" and rate == 8
    if has_encoder("libx264"):
        assert codec == "h264"
    wanted = video.repeat_interleave(4, 2).repeat_interleave(4, 3).movedim(1, -1).numpy() * 255
    error = np.abs(frames.astype(float) - wanted)
    assert error.mean() < 4
    # the middle of the square is where it should be in each frame
    for t in range(9):
        assert np.abs(frames[t, 120, 4 * (15 + 3 * t)] - wanted[t, 120, 4 * (15 + 3 * t)]).max() < 12
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_the_same_video_gives_the_same_bytes():
    """Also while other threads decode and encode: libx264's mbtree reads memory that it never wrote."""
    video = torch.rand(17, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = media.mp4_bytes(video, min_size=0)

    def again(_):
        media.load_video(first)
        return media.mp4_bytes(video, min_size=0)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(again, range(60))) == {first}


@pytest.mark.parametrize(("height", "width", "wanted"), [(33, 47, (34, 48)), (64, 64, (64, 64)), (1, 1, (2, 2))])
def test_mp4_odd_sizes_get_one_more_row_or_column(tmp_path, height, width, wanted):
    video = torch.rand(3, 3, 1, 1).expand(3, 3, height, width)
    frames, _ = decode(media.save_video(video, tmp_path / "odd.mp4", min_size=0))
    assert frames.shape == (3, *wanted, 3)
    assert np.abs(frames[:, 0, 0] - video[:, :, 0, 0].numpy() * 255).max() < 12


def test_fractional_frame_rate(tmp_path):
    _, (_, _, rate) = decode(media.save_video(moving_square(), tmp_path / "a.mp4", fps=23.976))
    assert abs(rate - 23.976) < 1e-3


def test_gif_frames_and_pace(tmp_path):
    video = moving_square(9)
    with Image.open(media.save_gif(video, tmp_path / "clip.gif", fps=8)) as image:
        assert image.n_frames == 9 and image.size == (256, 256)
        assert image.info["loop"] == 0
        durations = []
        for t in range(image.n_frames):
            image.seek(t)
            durations.append(image.info["duration"])
            pixels = np.asarray(image.convert("RGB"), dtype=float)
            wanted = video[t].repeat_interleave(4, 1).repeat_interleave(4, 2).movedim(0, -1).numpy() * 255
            assert np.abs(pixels - wanted).max() < 8
    assert set(durations) == {120}  # 1/8 s is 12.5 hundredths


def test_gif_of_a_still_video_keeps_its_length(tmp_path):
    video = torch.full((6, 3, 16, 16), 0.3)
    with Image.open(io.BytesIO(media.gif_bytes(video, fps=10))) as image:
        total = 0
        for t in range(getattr(image, "n_frames", 1)):
            image.seek(t)
            total += image.info["duration"]
    assert total == 600


def test_contact_sheet_grows_with_rows_frames_and_captions(tmp_path):
    videos = torch.stack([moving_square()] * 3)

    def size(path):
        with Image.open(path) as image:
            return image.size

    one = size(media.contact_sheet(videos[:1], ["a red square"], tmp_path / "1.png", frames=4))
    three = size(media.contact_sheet(videos, ["a red square"] * 3, tmp_path / "3.png", frames=4))
    wide = size(media.contact_sheet(videos[:1], ["a red square"], tmp_path / "w.png", frames=6))
    assert one[0] >= 4 * 128 and one[1] >= 128
    assert three[0] == one[0] and three[1] > 2.8 * one[1] - 40
    assert wide[0] - one[0] == 2 * (128 + 4)
    two_columns = size(media.contact_sheet(videos[:2], ["a"] * 2, tmp_path / "2.png", frames=4, columns=2))
    assert two_columns == (2 * one[0], one[1])
    long = size(media.contact_sheet(videos[:1], ["very long caption " * 30], tmp_path / "l.png", frames=4))
    assert long[0] == one[0] and long[1] > one[1] + 60


def test_contact_sheet_shows_first_and_last_frame(tmp_path):
    videos = torch.stack([torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 64, 64)])
    with Image.open(media.contact_sheet(videos, ["ramp"], tmp_path / "ramp.png", frames=5)) as image:
        shown = np.asarray(image.convert("L"))[100, 12 + 64 :: 132][:5]
    assert np.abs(shown.astype(int) - np.array([0, 64, 128, 191, 255])).max() <= 1


def test_before_after_colors_the_better_score(tmp_path):
    before, after = torch.zeros(3, 5, 3, 64, 64), torch.ones(3, 5, 3, 64, 64)
    scores = {"before_scores": [0.1, 0.9, None], "after_scores": [0.8, 0.2, 0.5]}
    path = media.before_after_sheet(before, after, ["x", "y", "z"], tmp_path / "s.png", **scores)
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert (0x12, 0x7A, 0x3A) in colors and (0xB3, 0x26, 0x1E) in colors


def test_tensorboard_reads_the_gif(tmp_path):
    videos = torch.stack([moving_square()] * 3)
    with SummaryWriter(str(tmp_path)) as writer:
        media.add_gif(writer, "samples", videos, step=7, fps=5)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("samples")
    assert image.step == 7 and (image.height, image.width) == (128, 128)
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert gif.format == "GIF" and gif.n_frames == 9 and gif.size == (128, 128)
        pixels = np.asarray(gif.convert("RGB"))
    assert np.abs(pixels[100, 100].astype(int) - 128).max() <= 4, "the fourth cell of the grid is empty"
    assert pixels[30, 10, 0] > 200 and pixels[94, 10, 0] > 200


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda v, p: media.save_video(broken(v, 4, float("nan")), p / "a.mp4"), "video .*frame 4"),
        (lambda v, p: media.save_gif(broken(v, 2, float("inf")), p / "a.gif"), "frame 2"),
        (lambda v, p: media.contact_sheet(torch.stack([v, v]), "ab", p / "a.png"), "captions"),
        (
            lambda v, p: media.contact_sheet(torch.stack([v, broken(v, 3, float("nan"))]), ["a", "b"], p / "a.png"),
            "videos .*video 1, frame 3",
        ),
        (lambda v, p: media.save_video(v[:, :1], p / "a.mp4"), r"video has shape .*\(F, 3, H, W\)"),
        (lambda v, p: media.save_video((v * 255).byte(), p / "a.mp4"), "dtype torch.uint8"),
        (lambda v, p: media.save_video(v.numpy(), p / "a.mp4"), "ndarray"),
        (lambda v, p: media.save_video(v, p / "a.mp4", fps=0), "fps=0"),
        (lambda v, p: media.contact_sheet(v[None], ["a", "b"], p / "a.png"), "captions holds 2 entries for 1"),
        (lambda v, p: media.contact_sheet(v[None], ["a"], p / "a.png", frames=0), "frames=0"),
        (lambda v, p: media.contact_sheet(v[None], ["a"], p / "sheet"), "suffix"),
        (lambda v, p: media.before_after_sheet(v[None], v[None, :4], ["a"], p / "a.png"), "before has shape"),
    ],
)
def test_bad_input_is_named_and_leaves_no_file(tmp_path, make, wanted):
    with pytest.raises(ValueError, match=wanted):
        make(moving_square(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = media.save_video(moving_square(), tmp_path / "a.mp4")
    old = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        media.save_video(moving_square(color=(0, 0, 1)), path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_saved_video_is_read_again(tmp_path):
    video = moving_square()
    media.save_video(video, tmp_path / "a.mp4", min_size=0)
    read = media.load_video(tmp_path / "a.mp4")
    assert read.shape == video.shape and (read - video).abs().mean() < 0.03
    few = media.load_video(tmp_path / "a.mp4", frames=3)
    assert torch.equal(few, read[[0, round((len(read) - 1) / 2), -1]])
    (tmp_path / "b.mp4").write_text("no video")
    for name in ("b.mp4", "c.mp4"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a video"):
            media.load_video(tmp_path / name)
