"""InternVideo2 stage 2: official names of weights, loading, interpolated time, saving."""

import pickle
from pathlib import Path

import pytest
import torch
from rewards.tiny_encoders import build, tokenizer

from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.encoders.internvideo2 import InternVideo2, InternVideo2Config, _positions_for

OFFICIAL = """
vision_encoder.cls_token vision_encoder.pos_embed vision_encoder.patch_embed.proj.weight
vision_encoder.patch_embed.proj.bias vision_encoder.blocks.0.norm1.weight vision_encoder.blocks.0.attn.qkv.weight
vision_encoder.blocks.0.attn.q_norm.weight vision_encoder.blocks.0.attn.k_norm.weight
vision_encoder.blocks.0.attn.proj.weight vision_encoder.blocks.0.attn.proj.bias vision_encoder.blocks.0.ls1.gamma
vision_encoder.blocks.0.norm2.weight vision_encoder.blocks.0.mlp.fc1.weight vision_encoder.blocks.0.mlp.fc1.bias
vision_encoder.blocks.0.mlp.fc2.weight vision_encoder.blocks.0.mlp.fc2.bias vision_encoder.blocks.0.ls2.gamma
vision_encoder.clip_projector.norm1_q.weight vision_encoder.clip_projector.norm1_q.bias
vision_encoder.clip_projector.norm1_k.weight vision_encoder.clip_projector.norm1_k.bias
vision_encoder.clip_projector.norm1_v.weight vision_encoder.clip_projector.norm1_v.bias
vision_encoder.clip_projector.cross_attn.q_bias vision_encoder.clip_projector.cross_attn.k_bias
vision_encoder.clip_projector.cross_attn.v_bias vision_encoder.clip_projector.cross_attn.q.weight
vision_encoder.clip_projector.cross_attn.k.weight vision_encoder.clip_projector.cross_attn.v.weight
vision_encoder.clip_projector.cross_attn.proj.weight vision_encoder.clip_projector.cross_attn.proj.bias
text_encoder.bert.embeddings.word_embeddings.weight text_encoder.bert.embeddings.position_embeddings.weight
text_encoder.bert.embeddings.token_type_embeddings.weight text_encoder.bert.embeddings.LayerNorm.weight
text_encoder.bert.encoder.layer.0.attention.self.query.weight
text_encoder.bert.encoder.layer.2.crossattention.self.key.weight
text_encoder.bert.encoder.layer.2.crossattention.output.dense.bias
text_encoder.bert.encoder.layer.0.intermediate.dense.weight text_encoder.bert.encoder.layer.0.output.LayerNorm.bias
vision_proj.weight vision_proj.bias text_proj.weight text_proj.bias itm_head.weight itm_head.bias temp
""".split()


def test_the_weights_have_their_official_names():
    assert set(OFFICIAL) <= set(build("internvideo2").state_dict())


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
