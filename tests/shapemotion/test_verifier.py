import numpy as np
import pytest
import torch

from pisces_rl.shapemotion import (
    ALIGNMENT,
    QUALITY,
    SPLITS,
    lay_out,
    parse,
    render,
    render_layout,
    sample_scenes,
    verify,
)
from pisces_rl.shapemotion.segmentation import pool, segment
from pisces_rl.shapemotion.specs import SceneSpecs
from pisces_rl.shapemotion.tracks import track


def everything(result):
    named = {**result.alignment_dimensions, **result.quality_dimensions}
    return {**named, "alignment": result.alignment, "quality": result.quality, "correct": result.correct}


def clips(n, split="train", seed=0, **how):
    scenes = sample_scenes(n, split, seed)
    return render(scenes, seed, **how), [scene.prompt() for scene in scenes]


@pytest.mark.parametrize("split", SPLITS)
def test_rendered_clips_are_correct(split):
    result = verify(*clips(200, split, seed=11))
    assert result.correct.mean() >= 0.99
    assert result.alignment.mean() >= 0.995 and result.quality.mean() >= 0.98
    assert result.quality_dimensions["motion_smoothness"].mean() >= 0.97


def test_the_prompt_decides_which_dimensions_count():
    prompts = [
        "a circle",
        "a red circle and a large blue square moving left slowly",
        "two red circles on a gray background",
    ]
    result = verify(render([parse(p) for p in prompts]), prompts)
    asked = {name: (~np.isnan(result.alignment_dimensions[name])).tolist() for name in ALIGNMENT}
    for name in ("object_class", "count", "no_extra_objects"):
        assert asked[name] == [True, True, True]
    for name in ("multiple_objects", "motion", "speed", "size"):
        assert asked[name] == [False, True, False]
    assert asked["color"] == [False, True, True] and asked["scene"] == [False, False, True]
    assert asked["spatial_relationship"] == [False, False, False]
    assert result.correct.all() and len(result) == 3
    means = np.array([result.quality_dimensions[name] for name in QUALITY]).mean(0)
    assert np.allclose(means, result.quality)
    summary = result.summary()
    assert summary["correct"] == 1 and "spatial_relationship" not in summary and summary["dynamic_degree"] <= 1


def test_a_clip_is_scored_by_itself():
    videos, prompts = clips(40, seed=5)
    videos[::4] = torch.rand(videos[::4].shape, generator=torch.Generator().manual_seed(0))
    together = everything(verify(videos, prompts))
    for i in range(0, 40, 3):
        alone = everything(verify(videos[i : i + 1], prompts[i : i + 1]))
        for name, values in together.items():
            assert np.allclose(alone[name][0], values[i], atol=1e-6, equal_nan=True), name
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = everything(verify(videos[order], [prompts[i] for i in order]))
    for name, values in together.items():
        assert np.allclose(shuffled[name], values[order.numpy()], atol=1e-6, equal_nan=True), name


def test_an_object_that_is_measured_is_where_it_was_drawn():

    specs = SceneSpecs.from_scenes(
        [scene for f in ("color", "motion", "speed", "size") for scene in sample_scenes(40, "train", 2, f)]
    )
    layout = lay_out(specs, torch.Generator().manual_seed(2))
    tracks = track(segment(pool(render_layout(layout))))
    assert len(tracks.clip) == 161  # one each, and the empty one
    t = np.arange(17)
    for measured, axis in ((tracks.x, 0), (tracks.y, 1)):
        drawn = layout.start[:, 0, axis, None].numpy() + layout.velocity[:, 0, axis, None].numpy() * t
        assert np.abs(measured[:-1] - drawn).max() < 0.25
    assert np.abs(np.stack(tracks.velocity(), -1)[:-1] - layout.velocity[:, 0].numpy()).max() < 0.02
    assert np.abs(tracks.growth()[:-1] / layout.growth[:, 0].numpy() - 1).max() < 0.1
    middle = (layout.radius * (1 + layout.growth) / 2)[:, 0].numpy()
    assert np.abs(tracks.radius[:-1] / middle - 1).max() < 0.06


@pytest.mark.parametrize("motion", ["growing", "shrinking", "moving left"])
def test_what_changes_does_not_stay_still(motion):
    videos = render([parse(f"a cyan circle {motion}")] * 20)
    result = verify(videos, ["a cyan circle staying still"] * 20)
    assert not result.correct.any() and result.alignment_dimensions["motion"].max() < 0.5
    still = verify(render([parse("a cyan circle staying still")] * 20), ["a cyan circle staying still"] * 20)
    assert still.correct.all()


def test_swapped_colors_are_wrong_of_class_only():
    videos = render([parse("a red circle and a blue square")] * 4)
    result = verify(videos, ["a blue circle and a red square"] * 4)
    assert not result.correct.any()
    assert (result.alignment_dimensions["color"] == 1).all() and (
        result.alignment_dimensions["object_class"] == 0
    ).all()


def test_an_object_the_prompt_lacks_counts_as_extra():
    videos = render([parse("a red circle and a blue square")] * 4)
    result = verify(videos, ["a red circle"] * 4)
    assert (result.alignment_dimensions["no_extra_objects"] == 0).all() and not result.correct.any()
    assert (result.alignment_dimensions["count"] == 1).all()


def test_an_empty_clip_scores_low_and_raises_nothing():
    result = verify(
        torch.full((3, 17, 3, 64, 64), 0.5), ["a circle", "a red circle moving left", "a red circle and a cyan cross"]
    )
    assert not result.correct.any() and (result.quality <= 0.61).all()
    assert (result.alignment_dimensions["object_class"] == 0).all()


@pytest.mark.parametrize("how", [{"size": 32}, {"size": 96}, {"num_frames": 4}, {"num_frames": 33}])
def test_other_sizes_and_lengths(how):
    result = verify(*clips(60, seed=3, **how))
    assert result.correct.mean() >= 0.95 and result.quality.mean() >= 0.95


def test_types_and_gradients_do_not_matter():
    videos, prompts = clips(8, seed=6)
    expected = verify(videos, prompts)
    for other in (videos.half(), videos.bfloat16(), videos.double(), videos.clone().requires_grad_()):
        result = verify(other, prompts)
        assert (result.correct == expected.correct).all()
        assert np.allclose(result.alignment, expected.alignment, atol=0.02)
    # not contiguous: as a decoder leaves them
    channels_first = videos.transpose(1, 2).contiguous().transpose(1, 2)
    assert np.array_equal(verify(channels_first, prompts).quality, expected.quality)


GOOD = torch.zeros(2, 4, 3, 32, 32)


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        (GOOD[0], ["a circle"] * 2, r"shape \(4, 3, 32, 32\)"),
        (GOOD.transpose(1, 2), ["a circle"] * 2, "Channels come third"),
        (GOOD[:, :3], ["a circle"] * 2, r"shape \(2, 3, 3, 32, 32\)"),
        (GOOD[..., :16], ["a circle"] * 2, r"\(32, 16\) pixels"),
        (torch.zeros(2, 4, 3, 48, 48), ["a circle"] * 2, r"\(48, 48\) pixels"),
        (GOOD.byte(), ["a circle"] * 2, "uint8.*divide bytes by 255"),
        (GOOD + torch.nan, ["a circle"] * 2, "not finite"),
        (GOOD + torch.inf, ["a circle"] * 2, "not finite"),
        (GOOD - 1, ["a circle"] * 2, "from -1 to -1"),
        (GOOD, ["a circle"], "1 texts for 2 videos"),
        (GOOD, "a circle", "one text for 2 videos"),
        (GOOD[:0], [], "no clip"),
        (GOOD.numpy(), ["a circle"] * 2, "ndarray"),
        (GOOD, ["a circle", ""], "prompt='' is empty"),
        (GOOD, ["a circle", "a pink circle"], "'a pink circle'.*'pink'"),
    ],
)
def test_bad_input_is_named(videos, prompts, message):
    with pytest.raises(ValueError, match=message):
        verify(videos, prompts)
