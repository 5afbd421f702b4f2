"""Which settings and parts of a reward change its identity in a server, and which do not."""

import functools
from pathlib import Path

import test_video_align

from pisces_rl.assets import asset_path
from pisces_rl.ot.maps import TransportMap
from pisces_rl.rewards import load_reward
from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.encoders.tiny_vtm import CARD
from pisces_rl.rewards.scorers.video_align import VideoAlign
from pisces_rl.rewards.server.identity import identity


def test_settings_and_parts_without_weights_have_a_part_in_the_identity(tmp_path):
    def video_align(template=test_video_align.TEMPLATE, **options):
        network = test_video_align.model(test_video_align.video_align.head(16))
        return VideoAlign(network, test_video_align.tokenizer(), template, **options)

    same = identity(video_align())
    assert same == identity(video_align(batch_size=7, offload="cpu"))
    for other in (
        video_align("Look. " + test_video_align.TEMPLATE),
        video_align(video_fps=8.0),
        video_align(weights=(1, 0, 1)),
    ):
        assert identity(other) != same

    encoder, other_map = load_encoder("tiny-vtm"), TransportMap.load(asset_path("tiny-vtm", CARD) / "map")
    names = list(other_map.tensors)
    largest = max(names, key=lambda name: other_map.tensors[name].numel())
    other_map.tensors[largest] = other_map.tensors[largest] + 1
    other_map.save(tmp_path)
    made = [
        load_reward("ot_quality", encoder=encoder, **options)
        for options in ({}, {"micro_batch": 2}, {"ot_map": tmp_path}, {"divergence_weight": 0.1})
    ]
    first, again, mapped, weighted = map(identity, made)
    assert first == again and len({first, mapped, weighted}) == 3
    banked = load_reward("ot_quality", encoder=encoder, divergence_weight=0.1, blur=0.5)
    before = identity(banked)
    banked.bank.self_potential = banked.bank.self_potential + 1e-7  # as on another device
    assert identity(banked) == before != weighted
    banked.bank.bank = banked.bank.bank + 1
    assert identity(banked) != before
    semantic = {identity(load_reward("ot_semantic", encoder=encoder, attention={"mass": m})) for m in (0.5, 0.5, 0.9)}
    assert len(semantic) == 2


def test_what_a_function_names_has_a_part_in_the_identity():
    def made(scale, batch_size=4, path=Path("a")):
        return lambda prompts, videos: [scale * batch_size * len(str(path)) for _ in prompts]

    def bound(prompts, videos, scale):
        return [scale for _ in prompts]

    assert identity(made(1.0)) == identity(made(1.0, 5, Path("b"))) != identity(made(2.0))
    halves = [functools.partial(bound, scale=scale) for scale in (0.5, 0.5, 1.0)]
    assert identity(halves[0]) == identity(halves[1]) != identity(halves[2])
