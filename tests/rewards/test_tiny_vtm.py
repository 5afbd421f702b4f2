"""The embedded encoder, its map and the rewards by name: on rendered clips, whose captions are known."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
import torch

from pisces_rl.assets import asset_path, available
from pisces_rl.ot.maps import TransportMap
from pisces_rl.rewards import ENCODER_REWARDS, RewardPanel, load_reward
from pisces_rl.rewards.encoders import load_encoder, tiny_vtm
from pisces_rl.shapemotion import render_layout, sample_layouts

CARD = tiny_vtm.CARD
SEEDS = Path(__file__).parents[2] / "assets_src" / "tiny_vtm_seeds.json"


@functools.cache
def clips(n=24):
    specs, layout = sample_layouts(n, "test_seen", generator=torch.Generator().manual_seed(5))
    return [scene.prompt() for scene in specs.scenes()], render_layout(layout, size=64)


def test_pipelines_and_encoders_are_listed_separately():
    assert available() == ["tiny-wan"] and available(CARD) == ["tiny-vtm", "tiny-vtm-judge"]
    with pytest.raises(ValueError, match="'tiny-vtm' is not an embedded model; did you mean 'tiny-wan'"):
        asset_path("tiny-vtm")


@pytest.mark.parametrize(("name", "entry"), [("tiny-vtm", "seed-2"), ("tiny-vtm-judge", "judge")])
def test_the_shipped_weights_are_the_recorded_ones(name, entry):
    weights = asset_path(name, CARD) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    seeds = json.loads(SEEDS.read_text())
    assert digest == seeds[entry]["sha256"] and load_encoder(name).name == f"{name}@{digest[:12]}"
    assert weights.stat().st_size < 10 * 2**20
    if entry != "judge":
        assert entry == min((k for k in seeds if k.count("-") == 1), key=lambda k: seeds[k]["validation"])


@pytest.mark.parametrize("name", ENCODER_REWARDS)
def test_every_reward_prefers_the_true_caption(name):
    prompts, videos = clips()
    reward = load_reward(name)
    wrong = prompts[1:] + prompts[:1]
    assert reward.__name__ == name and reward.differentiable
    assert (reward(prompts, videos) > reward(wrong, videos)).float().mean() > 0.9


def test_the_shipped_map_is_bound_to_the_shipped_encoder():
    folder = asset_path("tiny-vtm", CARD) / "map"
    with pytest.raises(ValueError, match=r"ot_map: it is bound to the encoder 'tiny-vtm@"):
        load_reward("ot_quality", encoder="tiny-vtm-judge", ot_map=folder)
    with pytest.raises(ValueError, match="ot_map: no map is shipped"):
        load_reward("ot_quality", encoder="tiny-vtm-judge")
    shipped = TransportMap.load(folder)
    assert shipped.kind == "mean_shift" and shipped.report["held_out"]["divergence"][0] < 0.012


def test_real_clips_are_nearer_to_the_bank_than_noise():
    prompts, videos = clips(8)
    reward = load_reward("ot_quality", cosine_weight=0.0, divergence_weight=1.0)
    noise = torch.rand(videos.shape, generator=torch.Generator().manual_seed(0))
    mixed = reward(prompts, torch.cat([videos[:4], noise[:4]]))
    assert mixed[:4].min() > mixed[4:].max()


def test_the_rewards_in_half_precision():
    prompts, videos = clips(8)
    encoder = load_encoder("tiny-vtm", dtype=torch.bfloat16)
    for name in ENCODER_REWARDS:
        half, whole = load_reward(name, encoder=encoder), load_reward(name)
        torch.testing.assert_close(half(prompts, videos), whole(prompts, videos), rtol=0, atol=0.05)


def test_unknown_rewards_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'ot_semantic'"):
        load_reward("ot_semantics")


def test_a_panel_of_both_rewards_encodes_each_video_once(monkeypatch):
    prompts, videos = clips(8)
    panel = RewardPanel([load_reward("ot_quality"), load_reward("ot_semantic")])
    encoder, seen = panel.funcs[0].encoder, []
    assert encoder is panel.funcs[1].encoder
    encode = encoder.encode_video
    monkeypatch.setattr(encoder, "encode_video", lambda part: seen.append(len(part)) or encode(part))
    table = panel(prompts, videos, {})
    assert sum(seen) == 8 and table.values.shape == (8, 2) and set(table.seconds) == {"ot_quality", "ot_semantic"}


def test_an_empty_prompt_has_a_reward():
    _, videos = clips(8)
    for name in ENCODER_REWARDS:
        assert load_reward(name)(["", ""], videos[:2]).isfinite().all()
