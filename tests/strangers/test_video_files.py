"""Video and picture files as phones, broadcasters, screen recorders and stickers write them.

The cases come from the issue trackers of PyAV, decord, torchcodec and of trainers that read users' clips.
"""

import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from datasets import Dataset, Video
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pisces_rl import media
from pisces_rl.trainers.base.data.images import check_images
from pisces_rl.trainers.base.data.video_data import as_video

RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 230, 230)


def bars(height=64, width=96) -> np.ndarray:
    """A white stripe at the top; below it red, green and blue from left to right."""
    image = np.empty((height, width, 3), np.uint8)
    for i, color in enumerate((RED, GREEN, BLUE)):
        image[:, i * width // 3 : (i + 1) * width // 3] = color
    image[: height // 4] = WHITE
    return image


def write(path, frames, codec="libx264", pix_fmt="yuv444p", times=None, options=None, prepare=lambda _: None):
    """A video file of (H, W, 3 or 4) uint8 frames, `times` in eighths of a second."""
    with av.open(str(path), "w") as container:
        options = options or ({"crf": "1", "preset": "ultrafast"} if codec == "libx264" else {})
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        prepare(stream)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = i if times is None else times[i], Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(count, height=16, width=16) -> list[np.ndarray]:
    """Frame i has gray 5 i."""
    return [np.full((height, width, 3), 5 * i, np.uint8) for i in range(count)]


def gray(video) -> list[int]:
    """Which of `levels` the frames are."""
    return (video.mean((1, 2, 3)) * 51).round().int().tolist()


def close(video, image, atol=6) -> bool:
    found = video[0].permute(1, 2, 0).numpy() * 255
    return found.shape == image.shape and np.abs(found - image).max() <= atol


# --- how a frame is shown ---


@pytest.mark.parametrize(
    ("degrees", "hflip", "vflip"),
    [
        (0, False, False),
        (90, False, False),
        (180, False, False),
        (-90, False, False),
        (0, True, False),
        (0, False, True),
        (90, True, False),
        (90, False, True),
    ],
)
def test_a_phone_writes_how_it_was_held_into_the_header(tmp_path, degrees, hflip, vflip):
    """Portrait videos decoded lying on their side."""

    def held(stream):
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)

    wanted = np.rot90(bars(), degrees // 90)  # counter-clockwise, mirrored after it
    wanted = wanted[:: -1 if vflip else 1, :: -1 if hflip else 1]
    path = write(tmp_path / "phone.mp4", [bars()] * 2, prepare=held)
    assert close(media.load_video(path), wanted)
    assert close(media.load_video(path.read_bytes(), frames=1), wanted)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 128), (Fraction(8, 9), 85), (Fraction(1, 2), 48)])
def test_pixels_that_are_not_square(tmp_path, aspect, width):
    """A DVD's 720 x 576 is shown as 1024 x 576; here a ball must stay round."""
    path = write(
        tmp_path / "dvd.mp4",
        [bars()] * 2,
        prepare=lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", aspect),
    )
    video = media.load_video(path)
    assert video.shape == (2, 3, 64, width)
    thirds = [(video[0, :, 40, width * x // 6] * 255).tolist() for x in (1, 3, 5)]
    assert np.abs(np.array(thirds) - [RED, GREEN, BLUE]).max() <= 6


def test_wide_pixels_of_a_phone_that_was_turned(tmp_path):
    """The pixel's aspect is that of the stored frame, before it is turned."""

    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        stream.set_display_rotation(90)

    assert media.load_video(write(tmp_path / "a.mp4", [bars()], prepare=prepare)).shape == (1, 3, 192, 64)


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p", "yuv420p10le"])
@pytest.mark.parametrize(("matrix", "full"), [(1, False), (1, True), (5, False), (5, True), (9, False)])
def test_colors_keep_the_files_matrix_and_range(tmp_path, pix_fmt, matrix, full):
    """BT.709, BT.601 and BT.2020, limited and full range, 8 and 10 bits: red stays red."""
    color_range = 2 if full else 1
    path = tmp_path / "colors.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        frame = av.VideoFrame.from_ndarray(bars(), format="rgb24").reformat(
            format=pix_fmt, dst_colorspace=matrix, dst_color_range=color_range
        )
        frame.colorspace, frame.color_range = matrix, color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = media.load_video(path)[0] * 255
    found = [video[:, 40, x].tolist() for x in (16, 48, 80)]
    assert np.abs(np.array(found) - [RED, GREEN, BLUE]).max() <= 5


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.apng", "apng", "rgba"),
        ("a.mkv", "ffv1", "bgra"),
    ],
)
def test_what_is_transparent_becomes_black(tmp_path, name, codec, pix_fmt):
    """A sticker's invisible pixels came out in the colour stored under them."""
    image = np.concatenate([bars(), np.full((64, 96, 1), 255, np.uint8)], 2)
    image[:, :32, 3], image[:, 32:64, 3] = 0, 128
    video = media.load_video(write(tmp_path / name, [image] * 2, codec, pix_fmt))
    found = (video[0, :, 40, [16, 48, 80]] * 255).T
    wanted = [(0, 0, 0), tuple(c * 128 / 255 for c in GREEN), BLUE]
    assert np.abs(found.numpy() - wanted).max() <= 5


def test_interlaced_frames_have_no_combs(tmp_path):
    """Two fields of a moving object in one frame trained combs into the model."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[0::2, 20:40], image[1::2, 28:48] = 200, 200

    path = write(tmp_path / "tv.mp4", [image] * 2, options={"crf": "1", "x264-params": "tff=1"})
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    video = media.load_video(path)
    assert (video[0, :, 1:] - video[0, :, :-1]).abs().max() < 0.03
    assert video[0, 0, 32, 24] > 0.7 and video[0, 0, 32, 44] < 0.1


@pytest.mark.parametrize(("height", "width"), [(33, 65), (1, 1), (64, 63)])
def test_odd_sizes(tmp_path, height, width):
    """yuv420p needs even sides: one row or column more is written; a format with odd sides is read as it is."""
    frames = levels(3, height, width)
    assert gray(media.load_video(write(tmp_path / "a.mkv", frames, "ffv1", "bgr0"))) == [0, 1, 2]
    video = torch.full((3, 3, height, width), 0.5)
    written = media.load_video(media.save_video(video, tmp_path / "b.mp4", min_size=0))
    assert written.shape == (3, 3, height + height % 2, width + width % 2)
    assert (written - 0.5).abs().max() < 0.02


def test_a_written_video_says_its_colors(tmp_path):
    """A player that guesses BT.709 for untagged files shows other colours than were trained on."""
    media.save_video(torch.rand(2, 3, 16, 16), tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (5, 1)


# --- which frames ---


def test_frames_are_spread_in_time_where_the_rate_varies(tmp_path):
    """A screen recorder writes a frame when something changes: 10 frames in the first second, one each later."""
    times = [*range(8), 16, 24, 32, 40]
    path = write(tmp_path / "screen.mp4", levels(12), times=times)
    assert gray(media.load_video(path, frames=6)) == [0, 7, 8, 9, 10, 11]  # for 0, 8, 16, 24, 32, 40 eighths
    assert gray(media.load_video(path)) == list(range(12))
    assert gray(media.load_video(path, frames=12)) == list(range(12))


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi", "a.ts", "a.gif", "a.mkv"])
def test_frames_of_a_constant_rate_are_spread_by_number(tmp_path, name):
    """Containers round times (GIF to 1/100 s, WebM to 1/1000 s): the same frames come out of each."""
    codec, pix_fmt = {"a.webm": ("libvpx", "yuv420p"), "a.avi": ("ffv1", "yuv420p"), "a.gif": ("gif", "gray")}.get(
        name, ("libx264", "yuv420p")
    )
    path = write(tmp_path / name, levels(40, 32, 32), codec, pix_fmt)
    for frames in (1, 2, 5, 39):
        wanted = np.linspace(0, 39, frames).round().astype(int)
        assert np.abs(np.array(gray(media.load_video(path, frames=frames))) - wanted).max() <= (name == "a.gif")


def test_memory_is_that_of_the_frames_that_are_kept(tmp_path):
    """Two frames of a film were requested; all were decoded into memory."""
    path = write(tmp_path / "film.mp4", levels(24, 256, 256) * 4, pix_fmt="yuv420p")
    tracemalloc.start()
    media.load_video(path, frames=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 256 * 256 * 3  # bytes; 96 frames are decoded


def test_a_stream_that_changes_its_size(tmp_path):
    """A video call over a bad connection was recorded in two sizes: all frames come in the first."""
    parts = [
        write(tmp_path / f"{i}.ts", levels(2, size, size), pix_fmt="yuv420p", times=[2 * i, 2 * i + 1])
        for i, size in enumerate((64, 32))
    ]
    (tmp_path / "call.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert media.load_video(tmp_path / "call.ts").shape == (4, 3, 64, 64)


# --- files that are not videos, or are broken ---


def add_cover(container, then) -> None:
    """A cover picture as the first stream, and the stream of the name `then` after it: the two are set up first."""
    cover = container.add_stream("mjpeg", rate=8)
    other = container.add_stream(then, rate=44100 if then == "aac" else 8)
    cover.height = cover.width = 32
    cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
    if then != "aac":
        other.height = other.width = 16
        other.pix_fmt = "yuv420p"
    container.mux(cover.encode(av.VideoFrame.from_ndarray(bars(32, 32), format="rgb24").reformat(format="yuvj420p")))
    frames = [sound()] if then == "aac" else [av.VideoFrame.from_ndarray(image) for image in levels(4)]
    for i, frame in enumerate(frames):
        frame.pts = i
        container.mux(other.encode(frame))
    container.mux(cover.encode())
    container.mux(other.encode())


def sound() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.rate = 44100
    return frame


def test_cover_art_is_not_a_video(tmp_path):
    """A clip whose first video stream is its cover: the clip is read. A track with a cover: an error."""
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        add_cover(container, then="libx264")
    assert gray(media.load_video(tmp_path / "clip.mp4")) == [0, 1, 2, 3]
    with av.open(str(tmp_path / "track.mp4"), "w") as container:
        add_cover(container, then="aac")
    with pytest.raises(ValueError, match="track.mp4: the file holds no video, only a cover picture"):
        media.load_video(tmp_path / "track.mp4")


def test_sound_without_pictures(tmp_path):
    """A podcast among the clips."""
    with av.open(str(tmp_path / "talk.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        container.mux(stream.encode(sound()))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="talk.m4a: the file holds no video"):
        media.load_video(tmp_path / "talk.m4a")


def test_truncated_files(tmp_path):
    """Half a download, an empty file, a text, a folder, nothing at all: each names the file."""

    def first(stream):
        stream.container.options["movflags"] = "faststart"

    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    whole = write(tmp_path / "whole.mp4", frames, prepare=first).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    for name, message in [
        ("half", "cannot be read as a video.*Replace the file, or re-encode"),
        ("empty", "it is empty"),
        ("text", "cannot be read"),
        ("folder", "cannot be read"),
        ("missing", "No such file.*Check the path"),
    ]:
        for frames in (None, 4):
            with pytest.raises(ValueError, match=rf"{name}\.mp4: .*{message}|{name}\.mp4.*{message}"):
                media.load_video(tmp_path / f"{name}.mp4", frames)
    with pytest.raises(ValueError, match="0 bytes"):
        media.load_video(b"")
    with pytest.raises(ValueError, match="frames=0"):
        media.load_video(tmp_path / "whole.mp4", frames=0)


def test_names_that_look_like_addresses(tmp_path, monkeypatch):
    """`take:1.mp4` was opened as a protocol."""
    monkeypatch.chdir(tmp_path)
    for name in ("take:1.mp4", "http:1.mp4", "50%d.mp4", "-i.mp4"):
        (tmp_path / name).write_bytes(write(tmp_path / "plain.mp4", levels(2)).read_bytes())
        assert gray(media.load_video(name)) == [0, 1]


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    """A picture, and pictures that move."""
    pictures = [Image.fromarray(np.rot90(bars(64, 64), i)) for i in range(3)]
    for name in ("a.png", "a.gif"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
        assert media.load_video(tmp_path / name).shape == (3, 3, 64, 64)
    for name in ("b.png", "b.jpg", "b.webp"):
        pictures[0].save(tmp_path / name)
        assert media.load_video(tmp_path / name).shape == (1, 3, 64, 64)


def test_the_row_of_a_broken_clip_is_named(tmp_path):
    """A run of a day must not end in "invalid data" without the file."""
    from pisces_rl.trainers.base.data.video_data import video_of

    (tmp_path / "bad.mp4").write_bytes(b"x" * 100)
    rows = Dataset.from_dict({"video": [str(tmp_path / "bad.mp4")]}).cast_column("video", Video(decode=False))
    with pytest.raises(ValueError, match="video_dataset row 7: .*bad.mp4: cannot be read as a video"):
        video_of(7, rows[0], 4)
    for given in ({"path": None, "bytes": None}, {"file": "a.mp4"}):
        with pytest.raises(ValueError, match="video: expected a path"):
            as_video(given)


# --- pictures ---


def picture(mode):
    rgb = Image.fromarray(bars())
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    return rgb.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("L", "a.png"),
        ("I;16", "a.png"),
        ("I;16", "a.tiff"),
        ("P", "a.png"),
        ("1", "a.png"),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tiff"),
        ("LA", "a.png"),
        ("RGBA", "a.png"),
        ("RGBA", "a.webp"),
        ("I", "a.tiff"),
        ("F", "a.tiff"),
    ],
)
def test_pictures_of_every_mode(tmp_path, mode, name):
    """16-bit pictures came out white."""
    given = picture(mode)
    given.save(tmp_path / name)
    wanted = np.asarray(
        picture({"L": "L", "I;16": "L", "LA": "L", "I": "L", "F": "L", "P": "P", "1": "1"}.get(mode, "RGB")).convert(
            "RGB"
        )
    ).astype(int)
    tolerance = 12 if name in ("a.jpg", "a.webp") else 1
    for source in (tmp_path / name, given):
        found = np.asarray(media.load_image(source)).astype(int)
        assert found.shape == wanted.shape and np.abs(found - wanted)[40, [16, 48, 80]].max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pictures_become_black(tmp_path, mode):
    """The invisible part of a cut-out had the colour of its eraser."""
    rgba = np.concatenate([bars(), np.full((64, 96, 1), 255, np.uint8)], 2)
    rgba[:, :48, 3] = 0
    given = Image.fromarray(rgba).convert(mode)
    if mode == "P":
        given = Image.fromarray(rgba).quantize(16)
    if mode in ("RGBA", "LA", "P"):
        given.save(tmp_path / "a.png")
        given = tmp_path / "a.png"
    found = np.asarray(media.load_image(given)).astype(int)
    assert found[:, :40].max() == 0 and found[40, 80].max() > 20


def test_a_picture_with_exif_is_turned_from_memory_too(tmp_path):
    """The same photograph, as a path and as an opened image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(bars()).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert media.load_image(opened).size == media.load_image(tmp_path / "a.jpg").size == (64, 96)


def test_pictures_that_are_too_large_or_broken(tmp_path, monkeypatch):
    """A scanned map, half a download, floats: an error that names the row and the file."""
    Image.fromarray(bars()).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "none.png").write_bytes(b"")
    Image.fromarray(np.full((8, 8), 4000.0, np.float32)).save(tmp_path / "depth.tiff")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    Image.new("L", (600, 600)).save(tmp_path / "map.png")
    for name, message in [
        ("map.png", "too large.*scale it down"),
        ("half.png", "cannot be read"),
        ("none.png", "cannot be read"),
        ("depth.tiff", "8 bits"),
    ]:
        rows = Dataset.from_dict({"prompt": ["a"], "image": [str(tmp_path / name)]})
        with pytest.raises(ValueError, match=f"train_dataset row 0: image: .*{name}: .*{message}"):
            check_images("train_dataset", rows, ["image"])


# --- encoders, TensorBoard ---


def test_an_ffmpeg_without_encoders(tmp_path, monkeypatch):
    """A PyAV of a distribution that ships no H.264: StopIteration out of the first evaluation."""
    monkeypatch.setattr(media.encoding, "_CODECS", (("no-such-encoder", {}),))
    with pytest.raises(ValueError, match="no-such-encoder.*has none of them.*pip install.*num_sample_videos=0"):
        media.save_video(torch.rand(2, 3, 16, 16), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no-such-encoder"):
        media.check_mp4(8)
    assert not list(tmp_path.iterdir())
    media.save_gif(torch.rand(2, 3, 16, 16), tmp_path / "a.gif")


def test_training_says_so_before_the_model_is_loaded(tmp_path, monkeypatch):
    """The run would have ended at its first evaluation."""
    from trainers import tiny_runs

    from pisces_rl import VideoGRPOTrainer

    monkeypatch.setattr(media.encoding, "_CODECS", (("no-such-encoder", {}),))

    def trainer(**settings):
        config = tiny_runs.config(tmp_path, **settings)
        return VideoGRPOTrainer("no-such-model", tiny_runs.brightness, config, tiny_runs.prompts(4))

    with pytest.raises(ValueError, match="no-such-encoder"):
        trainer(num_sample_videos=2)


def test_the_second_encoder_of_the_list(tmp_path, monkeypatch):
    """Without H.264 the file is MPEG-4, and is read back."""
    monkeypatch.setattr(media.encoding, "_CODECS", (("no-such-encoder", {}), media.encoding._CODECS[-1]))
    video = torch.full((3, 3, 16, 16), 0.5)
    read = media.load_video(media.save_video(video, tmp_path / "a.mp4", min_size=0))
    assert (read - video).abs().max() < 0.03


@pytest.mark.parametrize("fps", [0, -8, float("nan"), float("inf"), 1e-5, 1e5])
def test_rates_that_no_player_has(tmp_path, fps):
    """A rate of 1e-5 was rounded to 0."""
    for save in (media.save_video, media.save_gif):
        with pytest.raises(ValueError, match="fps="):
            save(torch.rand(2, 3, 16, 16), tmp_path / "a", fps=fps)


@pytest.mark.parametrize("shape", [(0, 3, 3, 8, 8), (2, 0, 3, 8, 8), (2, 2, 4, 8, 8), (3, 8, 8), (2, 3, 3, 0, 8)])
def test_tensorboard_refuses_what_is_no_video(tmp_path, shape):
    """An empty batch was a ZeroDivisionError."""
    with SummaryWriter(tmp_path) as writer, pytest.raises(ValueError, match="video"):
        media.add_gif(writer, "samples", torch.zeros(shape), step=1)
