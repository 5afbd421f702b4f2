"""`pisces-rl convert`: published pickles as safetensors that give the same scores, and what is refused."""

import pytest
import test_image_reward
import test_video_align
import tiny_encoders
import tiny_qwen
import torch
from safetensors.torch import load_file, save_file
from test_aesthetic_predictor import tiny_tower

from pisces_rl import command
from pisces_rl.rewards import load_reward
from pisces_rl.rewards.scorers import aesthetic_predictor, image_reward, video_align
from pisces_rl.rewards.scorers.convert_weights import PICKLED, convert_weights

PROMPTS = ["a red circle moving left", "a blue square"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Tiny sizes in place of the published ones; {reward: its published pickle, random}."""
    monkeypatch.setattr(image_reward, "VISION", test_image_reward.TINY[0])
    monkeypatch.setattr(image_reward, "TEXT", test_image_reward.TINY[1])
    monkeypatch.setattr(video_align, "SIZES", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_qwen.config().save_pretrained(tmp_path / "base")
    tiny_qwen.tokenizer().save_pretrained(tmp_path / "base")
    model = test_image_reward.tiny().state_dict()
    names = image_reward.official_names(list(model))
    words = torch.randn(4, 16)
    unread = {"blip.vision_proj.weight": words, "blip.text_proj.weight": words[:3]}  # of one memory
    states = {
        "aesthetic": aesthetic_predictor.AestheticHead().state_dict(),
        "image_reward": {names[name]: tensor for name, tensor in model.items()} | unread,
        "video_align": {name: tensor.bfloat16() for name, tensor in test_video_align.published_state().items()},
    }
    files = {"aesthetic": "head.pth", "image_reward": "ImageReward.pt", "video_align": "checkpoint-7/model.pth"}
    for reward, name in files.items():
        (tmp_path / reward / name).parent.mkdir(parents=True)
        torch.save(states[reward], tmp_path / reward / name)
    return {reward: tmp_path / reward / name for reward, name in files.items()}


def scores(reward: str, source, tmp_path) -> torch.Tensor:
    """Of a scorer with weights from a file or a folder; None: from where it looks by itself."""
    given = {} if source is None else {PICKLED[reward]: source}
    options = {
        "aesthetic": dict(clip=tiny_tower(), frames=2),
        "image_reward": dict(tokenizer=tiny_encoders.tokenizer(), frames=2, device="cpu"),
        "video_align": dict(base=tmp_path / "base", template=test_video_align.TEMPLATE, device="cpu"),
    }[reward]
    videos = torch.rand(2, 5, 3, 72, 104, generator=torch.Generator().manual_seed(1))
    return load_reward(reward, **given, **options)(PROMPTS, videos)


@pytest.mark.parametrize("reward", PICKLED)
def test_the_converted_file_holds_the_same_tensors_and_gives_the_same_scores(reward, tiny, tmp_path, capsys):
    pickle = tiny[reward]
    published = torch.load(pickle, weights_only=True)
    expected = None if reward == "aesthetic" else scores(reward, tmp_path / reward, tmp_path)
    command.main(["convert", reward, str(pickle), "--base", str(tmp_path / "base")])
    written = aesthetic_predictor.HEAD.expanduser() if reward == "aesthetic" else pickle.with_suffix(".safetensors")
    assert f'wrote {written}: load_reward("{reward}", {PICKLED[reward]}="{written}")' in capsys.readouterr().out
    found = load_file(written)
    assert found.keys() == published.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in published.items()
    )
    if reward == "aesthetic":
        head = aesthetic_predictor.head_of(published, pickle)
        expected, folders = scores(reward, head, tmp_path), [None]
    else:
        folders = [tmp_path / reward, pickle.parent]
    pickle.write_text("not to be opened")
    for source in (written, str(written), *folders):
        assert torch.equal(scores(reward, source, tmp_path), expected)
    pickle.unlink()
    assert torch.equal(scores(reward, written if reward == "aesthetic" else tmp_path / reward, tmp_path), expected)


def test_the_last_checkpoint_counts_converted_or_not(tiny, tmp_path):
    """A later pickle is preferred to an earlier one's converted file."""
    later = tmp_path / "video_align" / "checkpoint-8" / "model.pth"
    convert_weights("video_align", tiny["video_align"], base=tmp_path / "base")
    first = scores("video_align", tmp_path / "video_align", tmp_path)
    later.parent.mkdir()
    torch.save(test_video_align.published_state(0.2), later)
    second = scores("video_align", tmp_path / "video_align", tmp_path)
    assert not torch.equal(first, second) and torch.equal(second, scores("video_align", later, tmp_path))
    convert_weights("video_align", later, base=tmp_path / "base")
    assert torch.equal(scores("video_align", tmp_path / "video_align", tmp_path), second)


def test_a_legacy_pickle_is_read(tiny, tmp_path):
    """The layout of torch before 1.6, which is no zip archive."""
    state = torch.load(tiny["image_reward"], weights_only=True)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    written = convert_weights("image_reward", tmp_path / "old.pt", tmp_path / "new" / "weights.safetensors")
    expected = scores("image_reward", tmp_path / "image_reward", tmp_path)
    assert torch.equal(scores("image_reward", written, tmp_path), expected)


class Program:
    """A pickle that writes a file where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.mark.parametrize("reward", PICKLED)
def test_what_is_no_pickle_of_the_scorers_weights_is_refused(reward, tiny, tmp_path):
    file, output = tiny[reward], tmp_path / "out.safetensors"
    other = {"aesthetic": "image_reward", "image_reward": "video_align", "video_align": "aesthetic"}[reward]
    state = torch.load(file, weights_only=True)
    first = next(iter(state))
    cases = [
        (torch.load(tiny[other], weights_only=True), f"does not hold the weights of .*: {first} is missing"),
        ({name: tensor for name, tensor in state.items() if name != first}, f": {first} is missing"),
        (state | {"extra.weight": torch.zeros(1)}, "extra.weight is unknown"),
        (state | {first: torch.zeros(2, 3, 4)}, rf"{first} has shape \(2, 3, 4\), not"),
        ({first: Program(tmp_path / "ran")}, "is not a pickle of tensors alone"),
        ({"state_dict": state}, "is a pickle, but does not hold tensors by name"),
        ([1, 2], "is a pickle, but does not hold tensors by name"),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            convert_weights(reward, file, output, base=tmp_path / "base")
    for text in ("", "hello", "PK\x03\x04 torn"):
        file.write_text(text)
        with pytest.raises(ValueError, match="is not a pickle of tensors alone, and nothing else is read"):
            convert_weights(reward, file, output, base=tmp_path / "base")
    assert not (tmp_path / "ran").exists() and not output.exists()


def test_errors_are_sentences(tiny, tmp_path, capsys):
    file, there = tiny["image_reward"], tmp_path / "there.safetensors"
    save_file({"a": torch.zeros(1)}, there)
    before = there.read_bytes()
    for arguments, message in [
        (["image_rewrd", file], "reward 'image_rewrd' has no weights .* pickle; did you mean 'image_reward'"),
        (["pickscore", file], "reward 'pickscore' has no weights .* These have: aesthetic, image_reward, vid"),
        (["image_reward", tmp_path / "none.pt"], "file: there is no .*none.pt; pass the published pickle"),
        (["image_reward", there], "there.safetensors is a safetensors file already"),
        (["image_reward", file, "--output", there], "output: .*there.safetensors exists already; remove it, or"),
        (["image_reward", file, "--output", tmp_path / "a.pt"], "output: .*a.pt must be a file that ends with .safet"),
        (["aesthetic", file], "ImageReward.pt does not hold .* head: layers.0.weight is missing"),
    ]:
        with pytest.raises(SystemExit, match=f"^pisces-rl convert: .*{message}"):
            command.main(["convert", *map(str, arguments)])
    assert there.read_bytes() == before and not capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"base", *PICKLED, "there.safetensors"}


def test_an_interrupted_write_leaves_nothing(tiny, monkeypatch):
    def full(descriptor, *arguments):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SystemExit, match="pisces-rl convert: no space left"):
        command.main(["convert", "image_reward", str(tiny["image_reward"])])
    assert [path.name for path in tiny["image_reward"].parent.iterdir()] == ["ImageReward.pt"]
