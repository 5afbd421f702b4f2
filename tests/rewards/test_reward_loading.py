"""Rewards by name: which map belongs to which encoder, and options that a reward does not use."""

import pytest
import torch
from tiny_encoders import build

from pisces_rl.assets import asset_path
from pisces_rl.rewards import OTAttention, OTQualityReward, OTSemanticReward, RewardPanel, load_reward, loading
from pisces_rl.rewards.encoders import load_encoder, tiny_vtm

FOLDER = asset_path("tiny-vtm", tiny_vtm.CARD)


def test_the_shipped_map_is_for_tiny_vtm_however_it_is_given():
    prompts, videos = ["a red circle"], torch.rand(1, 17, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load_reward("ot_quality", divergence_weight=0.1)(prompts, videos)
    for encoder in (FOLDER, str(FOLDER), load_encoder("tiny-vtm")):
        own = load_reward("ot_quality", encoder=encoder, divergence_weight=0.1)
        torch.testing.assert_close(own(prompts, videos), expected)


def test_the_shipped_map_is_for_no_other():
    with pytest.raises(ValueError, match="ot_map: no map is shipped for tiny-vtm, only for tiny-vtm@.*; fit one with"):
        load_reward("ot_quality", encoder=build("tiny_vtm"))


@pytest.mark.parametrize(
    ("name", "options", "unused"),
    [
        ("cosine", {"ot_map": FOLDER / "map"}, "ot_map"),
        ("cosine", {"ot_map": FOLDER / "map", "attention": {"plan": "full"}}, "attention, ot_map"),
        ("matching", {"attention": OTAttention()}, "attention"),
        ("matching", {"ot_map": FOLDER / "map"}, "ot_map"),
        ("matching", {"solver": "geomloss"}, "solver"),
        ("ot_quality", {"attention": {}}, "attention"),
        ("ot_semantic", {"divergence_weight": 0.1}, "divergence_weight"),
        ("ot_quality", {"plan": "full"}, "plan"),
        ("ot_semantic", {"matcher": "tiny-vtm"}, "matcher"),
    ],
)
def test_options_that_a_reward_does_not_use_are_refused_before_anything_is_loaded(name, options, unused, monkeypatch):
    monkeypatch.setattr(loading, "shared_encoder", lambda *args, **kwargs: pytest.fail("an encoder was loaded"))
    with pytest.raises(ValueError, match=f"reward '{name}' does not use {unused}; it takes .*micro_batch"):
        load_reward(name, encoder="elsewhere", **options)


def test_settings_are_looked_at_before_the_encoder_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "shared_encoder", lambda *args, **kwargs: pytest.fail("an encoder was loaded"))
    with pytest.raises(ValueError, match="plan='exact'"):
        load_reward("ot_semantic", encoder="elsewhere", attention={"plan": "exact"})
    for name in ("ot_semantic?solver=pot", "ot_quality?solver=pot&divergence_weight=1"):
        with pytest.raises(ValueError, match="solver='pot': expected one of native, geomloss"):
            load_reward(name, encoder="elsewhere")
    with pytest.raises(ValueError, match="solver='geomloss': no partial plans, only unbalanced and balanced"):
        load_reward("ot_semantic", encoder="elsewhere", attention={"plan": "partial", "solver": "geomloss"})
    with pytest.raises(FileNotFoundError, match="holds no map"):
        load_reward("ot_quality", encoder="elsewhere", ot_map=tmp_path)


@pytest.mark.parametrize("name", ["ot_semantic?", "ot_quality?divergence_weight=0.5&"])
def test_a_solver_by_name_gives_the_same_reward(name):
    prompts = ["a red circle", "a green square moving up"]
    videos = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values, gradients = [], []
    for solver in ("native", "geomloss"):
        reward = load_reward(f"{name}solver={solver}")
        bank = getattr(reward, "bank", None)
        assert solver == (reward.attention.solver if bank is None else bank.settings["solver"])
        values.append(reward(prompts, videos))
        gradients += torch.autograd.grad(values[-1].sum(), videos)
    torch.testing.assert_close(values[1], values[0], atol=1e-4, rtol=1e-4)
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


def test_an_encoder_that_was_trained_again_is_loaded_again(tmp_path):
    encoder = build("tiny_vtm")
    encoder.save(tmp_path)
    first = load_reward("cosine", encoder=tmp_path).encoder
    assert load_reward("matching", encoder=str(tmp_path)).encoder is first
    encoder.class_token.data += 1
    encoder.save(tmp_path)
    assert load_reward("cosine", encoder=tmp_path).encoder.name != first.name


def test_the_classes_take_names_too():
    quality, semantic = OTQualityReward("tiny-vtm"), OTSemanticReward(FOLDER)
    assert quality.encoder is load_reward("cosine").encoder and semantic.encoder.name == quality.encoder.name
    for kind in (OTQualityReward, OTSemanticReward):
        with pytest.raises(TypeError, match="encoder: expected a VideoTextEncoder, .*, got None"):
            kind(None)


def test_rewards_share_an_encoder_unless_one_offloads():
    first, second = load_reward("cosine"), load_reward("matching")
    offloaded = load_reward("cosine", offload="cuda")
    assert first.encoder is second.encoder and first.encoder is not offloaded.encoder
    assert offloaded.encoder is load_reward("matching", offload="cuda").encoder
    assert offloaded.encoder.offload == "cuda" and offloaded.encoder.device.type == "cpu"
    assert first.encoder.offload is None
    with pytest.raises(ValueError, match="offload: set it on the encoder itself"):
        load_reward("cosine", encoder=load_encoder("tiny-vtm"), offload="cuda")


def test_options_follow_the_name(monkeypatch):
    motion = load_reward("motion_flow?video_fps=4&threshold=3")
    assert (motion.step, motion.threshold) == (1, 6) and motion.__name__ == "motion_flow"
    assert load_reward("motion_flow?threshold=3", threshold=5).threshold == 3
    quality = load_reward("cosine?micro_batch=3&cosine_weight=2", encoder="tiny-vtm", device="cpu")
    assert (quality.micro_batch, quality.cosine_weight, quality.__name__) == (3, 2, "cosine")
    given = {}
    monkeypatch.setattr(loading, "_scorer", lambda name: Kept)
    load_reward("video_align?weights=1,0,.5&video_fps=8&template=1+1&base=7&dtype=fp32", offload="cuda").check(given)
    assert given == dict(weights=[1, 0, 0.5], video_fps=8, template="1+1", base="7", dtype="fp32", offload="cuda")


class Kept:
    def __init__(
        self, *, name, weights=(1.0, 1.0, 1.0), video_fps=16.0, template="a", base="b", dtype=None, offload=None
    ):
        self.given = dict(
            weights=weights, video_fps=video_fps, template=template, base=base, dtype=dtype, offload=offload
        )

    def check(self, given):
        given |= self.given


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("motion_flow?fps=8", "'motion_flow' does not use fps; it takes video_fps, threshold"),
        ("motion_flow?video_fps=fast", "'motion_flow': video_fps='fast' must have the type of its default, 16.0"),
        ("motion_flow?video_fps", r"'motion_flow': expected motion_flow\?option=value&option=value, got 'video_fps'"),
        ("motion_flow?video_fps=0", "video_fps=0, threshold=6.0: both must be above 0"),
        ("video_align?weights=1,x,1", "'video_align': weights='1,x,1' must have the type of its default"),
        ("hpsv3?frames=2.5", "'hpsv3': frames='2.5' must have the type of its default, 4"),
        ("motion_flow?threshold=inf", "'motion_flow': threshold='inf' must have the type of its default, 6.0"),
        ("cosine?plan=full", "'cosine' does not use plan; it takes"),
        ("motion_flo?video_fps=8", "'motion_flo.video_fps=8' is unknown; did you mean 'motion_flow'"),
    ],
)
def test_options_behind_a_name_are_looked_at(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_panel_loads_names_with_options_where_it_works(monkeypatch):
    monkeypatch.setattr(loading, "shared_encoder", lambda name, offload, device: pytest.fail(f"on {device}"))
    with pytest.raises(pytest.fail.Exception, match="on cpu"):
        RewardPanel(["cosine?micro_batch=3"], device="cpu")
