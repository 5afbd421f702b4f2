"""InternVideo2 stage 2: official names of weights, loading, interpolated time, saving."""

import pickle
from pathlib import Path

import pytest
import torch
from rewards.tiny_encoders import build, tokenizer

from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.encoders.internvideo2 import InternVideo2, InternVideo2Config, _positions_for


def both(*names):
    return [f"{name}.{end}" for name in names for end in ("weight", "bias")]


BLOCK = [
    "norm1.weight",
    "norm2.weight",
    "attn.qkv.weight",
    "attn.q_norm.weight",
    "attn.k_norm.weight",
    "ls1.gamma",
    "ls2.gamma",
    *both("attn.proj", "mlp.fc1", "mlp.fc2"),
]
POOLING = [
    *both("norm1_q", "norm1_k", "norm1_v", "cross_attn.proj"),
    *(f"cross_attn.{x}" for x in ("q_bias", "k_bias", "v_bias", "q.weight", "k.weight", "v.weight")),
]
ATTENTION = both("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
LAYER = [*(f"attention.{x}" for x in ATTENTION), *both("intermediate.dense", "output.dense", "output.LayerNorm")]
EMBEDDINGS = [f"{x}_embeddings.weight" for x in ("word", "position", "token_type")] + both("LayerNorm")
OFFICIAL = [  # two blocks, and three layers; the last two attend to the video
    "vision_encoder.cls_token",
    "vision_encoder.pos_embed",
    *both("vision_encoder.patch_embed.proj"),
    *(f"vision_encoder.blocks.{i}.{x}" for i in range(2) for x in BLOCK),
    *(f"vision_encoder.clip_projector.{x}" for x in POOLING),
    *(f"text_encoder.bert.embeddings.{x}" for x in EMBEDDINGS),
    *(f"text_encoder.bert.encoder.layer.{i}.{x}" for i in range(3) for x in LAYER),
    *(f"text_encoder.bert.encoder.layer.{i}.crossattention.{x}" for i in (1, 2) for x in ATTENTION),
    *both("vision_proj", "text_proj", "itm_head"),
    "temp",
]


def test_the_weights_have_their_official_names():
    names = list(build("internvideo2").state_dict())
    assert sorted(names) == sorted(OFFICIAL)


def test_the_1b_model_has_the_published_size():
    with torch.device("meta"):
        model = InternVideo2(InternVideo2Config(), tokenizer())
    vision = sum(p.numel() for p in model.vision_encoder.parameters())
    assert 1.00e9 < vision < 1.10e9
    key = "text_encoder.bert.encoder.layer.{}.crossattention.self.key.weight"
    assert model.state_dict()[key.format(19)].shape == (1024, 1408)
    assert key.format(18) not in model.state_dict()
    assert model.vision_encoder.blocks[0].mlp.fc1.out_features == 6144


def test_official_weights_load_and_others_are_refused():
    source, target = build("internvideo2"), build("internvideo2")
    state = {k: torch.randn_like(v) for k, v in source.state_dict().items()}
    unused = ("vision_encoder.clip_decoder.0.head.weight", "text_encoder.cls.predictions.bias")
    extra = {name: torch.zeros(1) for name in unused}
    target.load_official(state | extra)
    assert all(torch.equal(v, state[k]) for k, v in target.state_dict().items())
    with pytest.raises(ValueError, match="temp is missing; head is unknown"):
        target.load_official({k: v for k, v in state.items() if k != "temp"} | {"head": torch.ones(1)})
    with pytest.raises(ValueError, match=r"itm_head.bias has shape \(3,\), not \(2,\)"):
        target.load_official(state | {"itm_head.bias": torch.ones(3)})


def test_positions_are_interpolated_in_time():
    positions = torch.randn(1, 1 + 4 * 6, 5)
    doubled = _positions_for(positions, 1 + 8 * 6, 6)
    assert doubled.shape == (1, 49, 5) and torch.equal(doubled[:, 0], positions[:, 0])
    frames, more = positions[0, 1:].unflatten(0, (4, 6)), doubled[0, 1:].unflatten(0, (8, 6))
    torch.testing.assert_close(more[1], 0.75 * frames[0] + 0.25 * frames[1])
    assert torch.equal(_positions_for(positions, 25, 6), positions)


def test_it_saves_and_loads(tmp_path):
    model = build("internvideo2")
    model.save(tmp_path, dtype=torch.float32)
    again = InternVideo2.load(tmp_path, tokenizer())
    videos = torch.rand(2, 3, 3, 16, 16)
    text, video = model.encode_text(["a red circle", "two squares"]), model.encode_video(videos)
    torch.testing.assert_close(again.encode_text(["a red circle", "two squares"]).pooled, text.pooled)
    torch.testing.assert_close(again.match(text, again.encode_video(videos)), model.match(text, video))
    assert again.name.startswith(f"{model.name}@")
    again.save(tmp_path / "copy", dtype=torch.float32)
    assert InternVideo2.load(tmp_path / "copy", tokenizer()).name == again.name
    model.temp.data += 1
    model.save(tmp_path, dtype=torch.float32)
    other = InternVideo2.load(tmp_path, tokenizer()).name
    assert other != again.name and other.startswith(f"{model.name}@")


def test_the_converter_makes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from convert_internvideo2 import convert

    source = build("internvideo2")
    torch.save({"module": {"model": source.state_dict()}}, tmp_path / "official.pt")
    convert(tmp_path / "official.pt", tmp_path / "folder", tokenizer(), source.config)
    loaded = load_encoder(str(tmp_path / "folder"), device="cpu")
    videos = torch.rand(1, 3, 3, 16, 16)
    torch.testing.assert_close(
        loaded.encode_video(videos).pooled, source.encode_video(videos).pooled, rtol=1e-2, atol=1e-2
    )
    torch.save({"weights": object}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError):
        convert(tmp_path / "code.pt", tmp_path / "other", tokenizer(), source.config)
