import numpy as np
import pytest
import torch

from pisces_rl.shapemotion import (
    parse,
    render,
    shapemotion_alignment,
    shapemotion_correct,
    shapemotion_product,
    shapemotion_quality,
    shapemotion_reward,
    verifier_rewards,
    verify,
)

ALL = (shapemotion_alignment, shapemotion_quality, shapemotion_product, shapemotion_correct, shapemotion_reward)
PROMPTS = ["a red circle", "a red circle moving left", "a red circle and a blue square"]


@pytest.fixture
def videos():
    return render([parse(p) for p in (PROMPTS[0], "a red circle moving right", PROMPTS[2])])


@pytest.fixture
def verifications(monkeypatch):
    calls = []

    def counted(videos, prompts):
        calls.append(len(prompts))
        return verify(videos, prompts)

    monkeypatch.setattr(verifier_rewards, "verify", counted)
    monkeypatch.setattr(verifier_rewards, "_latest", None)
    return calls


def test_values_are_those_of_the_verifier(videos):
    result = verify(videos, PROMPTS)
    expected = {
        "shapemotion_alignment": result.alignment,
        "shapemotion_quality": result.quality,
        "shapemotion_product": result.alignment * result.quality,
        "shapemotion_correct": np.array([1.0, 0.0, 1.0]),
        "shapemotion_reward": result.correct + result.alignment * result.quality,
    }
    for reward in ALL:
        values = reward(prompts=PROMPTS, videos=videos, trainer_state=None, family=["color"] * 3)
        assert all(type(value) is float for value in values)
        assert np.allclose(values, expected[reward.__name__])


def test_dimensions_are_reported_for_each_sample(videos):
    extra, metric = {}, {}
    shapemotion_reward(PROMPTS, videos, log_extra=extra.__setitem__, log_metric=metric.__setitem__)
    assert extra["shapemotion/motion"] == [None, 0.0, None]
    assert extra["shapemotion/object_class"] == [1.0, 1.0, 1.0]
    assert all(len(values) == 3 for values in extra.values()) and "shapemotion/dynamic_degree" in extra
    assert metric["shapemotion/correct"] == pytest.approx(2 / 3) and set(metric) == {
        "shapemotion/correct",
        "shapemotion/alignment",
        "shapemotion/quality",
    }


def test_a_batch_is_verified_once(videos, verifications):
    for reward in ALL:
        reward(prompts=PROMPTS, videos=videos)
    assert verifications == [3]


def test_a_changed_batch_is_verified_again(videos, verifications):
    before = shapemotion_correct(prompts=PROMPTS, videos=videos)
    other = shapemotion_correct(prompts=["a red square", *PROMPTS[1:]], videos=videos)
    assert before == [1.0, 0.0, 1.0] and other == [0.0, 0.0, 1.0]
    videos[2] = 0.5
    assert shapemotion_correct(prompts=PROMPTS, videos=videos) == [1.0, 0.0, 0.0]
    shapemotion_correct(prompts=PROMPTS, videos=videos.clone())
    assert len(verifications) == 4


def test_the_cache_keeps_no_videos_alive(videos, verifications):
    shapemotion_correct(prompts=PROMPTS, videos=videos.clone())
    assert verifier_rewards._latest[0]() is None


def test_inference_tensors_are_verified_each_time(videos, verifications):
    with torch.inference_mode():
        tensor = videos.clone()
        first = shapemotion_correct(prompts=PROMPTS, videos=tensor)
        tensor[2] = 0.5
        assert first == [1.0, 0.0, 1.0] and shapemotion_correct(prompts=PROMPTS, videos=tensor) == [1.0, 0.0, 0.0]
    assert len(verifications) == 2
