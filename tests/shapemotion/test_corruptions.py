import numpy as np
import pytest
import torch

from pisces_rl.shapemotion import (
    FAMILIES,
    QUALITY,
    SCENE_CORRUPTIONS,
    VIDEO_CORRUPTIONS,
    corrupt,
    parse,
    sample_scenes,
    verify,
)

# what a corruption takes to (nearly) 0; every other asked dimension stays above `OTHERS`
OWN = {
    "wrong_color": {"color"},
    "wrong_shape": {"object_class", "multiple_objects"},
    "wrong_motion": {"motion"},
    "wrong_count": {"count"},
    "wrong_size": {"size"},
    "wrong_speed": {"speed"},
    "wrong_relation": {"spatial_relationship"},
    "wrong_scene": {"scene"},
    "frozen": {"motion", "speed"},
    "time_reversed": {"motion"},
    "shuffled_frames": {"motion", "speed"},
}
OTHERS = 0.97


@pytest.fixture(scope="module")
def scenes():
    return [scene for i, family in enumerate(FAMILIES) for scene in sample_scenes(8, "train", i, family)]


def scores(name, scenes, only=lambda scene: True):
    scenes = [scene for scene in scenes if only(scene)]
    rows, videos = corrupt(name, scenes, seed=2)
    result = verify(videos, [scenes[i].prompt() for i in rows])
    means = {k: np.nanmean(v) for k, v in result.alignment_dimensions.items() if not np.isnan(v).all()}
    return result, means


@pytest.mark.parametrize("name", OWN)
def test_an_attribute_costs_its_own_dimension(name, scenes):
    # of two groups, some corruptions touch the first alone: one group says it purely
    _, pure = scores(name, scenes, lambda scene: len(scene.groups) == 1 or name == "wrong_relation")
    result, means = scores(name, scenes)
    assert result.correct.mean() <= 0.02
    for dimension, value in pure.items():
        assert value <= 0.05 if dimension in OWN[name] else value >= OTHERS, dimension
    for dimension, value in means.items():
        assert value <= 0.4 if dimension in OWN[name] else value >= OTHERS, dimension
    if name != "shuffled_frames":
        assert result.quality.mean() >= 0.98


def test_a_missing_object_costs_half_of_what_is_asked_of_both(scenes):
    result, means = scores("missing_object", scenes)
    assert not result.correct.any() and result.quality.mean() >= 0.98
    assert means["multiple_objects"] == means["spatial_relationship"] == 0
    for dimension in ("object_class", "color", "count"):
        assert 0.45 <= means[dimension] <= 0.55
    assert means["no_extra_objects"] == 1


def test_an_object_that_vanishes_half_way_fails(scenes):
    result, _ = scores("vanish_half", scenes)
    assert not result.correct.any()
    assert result.quality_dimensions["subject_consistency"].mean() < 0.6


@pytest.mark.parametrize(
    ("name", "quality", "correct", "falls"),
    [
        ("flicker", 0.7, 0.85, "temporal_flickering"),
        ("noise", 0.7, 0.97, "imaging_quality"),
        ("jitter", 0.85, 0.97, "motion_smoothness"),
        ("blur", 0.95, 0.65, "imaging_quality"),
    ],
)
def test_pixels_cost_quality(name, quality, correct, falls, scenes):
    # a box blur of 2.5 units closes the arms of small crosses (1.9 units wide): a fifth of the clips lose their shape
    result, means = scores(name, scenes)
    assert result.quality.mean() < quality and result.quality_dimensions[falls].mean() < 0.8
    assert result.correct.mean() >= correct and result.alignment.mean() >= 0.92
    assert all(value >= 0.9 for k, value in means.items() if k not in ("object_class", "multiple_objects"))


def test_freezing_is_not_a_fault_of_quality(scenes):
    result, _ = scores("frozen", scenes)
    assert result.quality.mean() > 0.99 and result.quality_dimensions["dynamic_degree"].max() == 0
    assert not result.correct.any()


def test_pure_noise_scores_zero(scenes):
    result, _ = scores("uniform_noise", scenes)
    assert not result.correct.any() and result.quality.mean() < 0.05 and result.alignment.mean() < 0.35


def test_every_corruption_says_what_it_applies_to():
    scenes = [parse("a circle"), parse("a red circle moving left quickly on a gray background")]
    for name in [*SCENE_CORRUPTIONS, *VIDEO_CORRUPTIONS]:
        if name in ("wrong_size", "wrong_relation", "missing_object"):
            with pytest.raises(ValueError, match="applies to none"):
                corrupt(name, scenes)
            continue
        rows, videos = corrupt(name, scenes, seed=1)
        assert videos.shape == (len(rows), 17, 3, 64, 64) and 0 <= videos.min() and videos.max() <= 1
        assert torch.equal(videos, corrupt(name, scenes, seed=1)[1])
    assert len(SCENE_CORRUPTIONS) + len(VIDEO_CORRUPTIONS) == 18 and len(QUALITY) == 5
    with pytest.raises(ValueError, match="name='wrong'"):
        corrupt("wrong", scenes)
