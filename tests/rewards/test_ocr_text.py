"""The OCR reward, for real: clips with rendered text, read by the models of the package."""

import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from pisces_rl.cli import load_reward_function
from pisces_rl.rewards import RewardPanel, load_reward
from pisces_rl.rewards.scorers.ocr_text import OCRText, quoted_texts, readable_share


def clip(*texts: str, size=(192, 320), height: int = 40, move: int = 4, ink="white", paper="#204060") -> torch.Tensor:
    """(len(texts), 3, H, W): a frame a text, which moves to the right; lines are drawn below each other."""
    font, frames = ImageFont.load_default(height), []
    for number, text in enumerate(texts):
        image = Image.new("RGB", size[::-1], paper)
        ImageDraw.Draw(image).multiline_text((20 + move * number, 50), text, fill=ink, font=font)
        frames.append(torch.tensor(list(image.tobytes())).view(*size, 3).permute(2, 0, 1) / 255)
    return torch.stack(frames)


@pytest.fixture(scope="module")
def reward() -> OCRText:
    pytest.importorskip("rapidocr")
    return load_reward("ocr", frames=2)


def test_right_text_scores_above_wrong_text(reward):
    words = ["OPEN", "Fresh Bread"]
    prompts = [f'a sign that says "{word}"' for word in words]
    signs = torch.stack([clip(word) for word in words])
    assert reward(prompts, signs) == [1.0, 1.0]
    assert all(score < 0.6 for score in reward(prompts, signs.flip(0)))
    assert reward(prompts, clip("").expand(2, 1, -1, -1, -1)) == [0.0, 0.0]


def test_the_score_falls_letter_by_letter_and_frame_by_frame(reward):
    prompt = 'a poster "MOUNTAIN"'
    scores = [reward([prompt], clip(text)[None])[0] for text in ("MOUNTAXN", "MXXNTAXX")]
    assert scores == [7 / 8, 4 / 8]
    assert reward([prompt], clip("MOUNTAIN", "?", "")[None]) == [0.5]  # first and last frame


def test_lines_case_and_other_text_do_not_matter(reward):
    shop = clip("Bakery\nOPEN\n24 HOURS\nCoffee", height=32)
    assert reward(['a shop with "open 24 hours" above "Coffee"'], shop[None]) == [1.0]


def test_red_letters_on_blue_are_read_in_the_right_channel_order(reward):
    assert reward(['"SALE"'], clip("SALE", ink="#ff2020", paper="#000040")[None]) == [1.0]


def test_prompts_without_quoted_text_give_none(reward):
    videos = torch.stack([clip("OPEN")] * 2)
    assert reward(["a red circle", 'the word "OPEN"'], videos) == [None, 1.0]
    table = RewardPanel(reward)(["it's the dogs' house", 'a "STOP" sign'], videos, {})
    assert table.values[0].isnan().all() and table.values[1].isfinite().all() and "ocr" in table.seconds


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["open"]),
        ("a sign that says “Open Late”, and 'HI' below", ["openlate", "hi"]),
        ("a wall with «Bonjour», „Tag“ and 「こんにちは」", ["bonjour", "tag", "こんにちは"]),
        ("it's the dogs' house, 'tis true", []),
        ("a neon sign ‘it’s", []),
        ('an empty "" and a blank "  "', []),
        ('an inch: 5" wide', []),
        ("", []),
    ],
)
def test_quoted_texts(prompt, texts):
    assert quoted_texts(prompt) == texts


@pytest.mark.parametrize(
    ("wanted", "read", "share"),
    [
        ("open", "open", 1),
        ("open", "xxopenxx", 1),
        ("open", "", 0),
        ("open", "zzzzzzzz", 0),
        ("open", "opn", 3 / 4),
        ("open", "openn", 1),
        ("open", "o-p-e-n", 1 / 4),
        ("kitten", "sitting", 4 / 6),
        ("ab", "ba", 1 / 2),
    ],
)
def test_the_share_that_is_read(wanted, read, share):
    assert readable_share(wanted, read) == pytest.approx(share)


def test_the_distance_is_the_smallest_of_all_stretches():
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        wanted, read = ("".join("abc"[i] for i in torch.randint(3, (n,), generator=generator)) for n in (4, 5))
        stretches = [read[i:j] for i in range(6) for j in range(i, 6)]
        assert readable_share(wanted, read) == 1 - min(distance(wanted, part) for part in stretches) / 4


def test_a_missing_package_is_said_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(
        ImportError, match=r"reward 'ocr' reads text with RapidOCR; install it: pip install 'pisces_rl\[ocr\]'"
    ):
        load_reward("ocr")


def test_bad_inputs_are_named(reward):
    with pytest.raises(ValueError, match="frames=0"):
        OCRText(frames=0)
    with pytest.raises(ValueError, match="video 0 has values"):
        reward(['"A"'], clip("A")[None] * 255)
    with pytest.raises(ValueError, match="'ocr' does not use offload; it takes frames"):
        load_reward("ocr", offload="cuda")


def test_the_examples_options_for_encoders_do_not_concern_it(reward):
    assert isinstance(load_reward_function("ocr", encoder="tiny-vtm", offload="cuda"), OCRText)
