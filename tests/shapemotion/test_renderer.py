import math

import pytest
import torch

from pisces_rl.shapemotion import lay_out, parse, render, render_layout, sample_layouts, sample_scenes
from pisces_rl.shapemotion.grammar import SHAPES
from pisces_rl.shapemotion.layout import search_layout
from pisces_rl.shapemotion.renderer import BACKGROUND_RGB, COLOR_RGB, coverage
from pisces_rl.shapemotion.specs import SceneSpecs


def border(videos):
    return torch.cat([videos[..., 0, :], videos[..., -1, :], videos[..., 0], videos[..., -1]], -1)


def test_clips_have_the_promised_form_and_stay_in_the_frame():
    videos = render(sample_scenes(100, "train", seed=1), seed=2)
    assert videos.shape == (100, 17, 3, 64, 64) and videos.dtype == torch.float32
    assert videos.min() >= 0 and videos.max() <= 1
    edge = border(videos)
    assert (edge == edge[:, :1, :, :1]).all()  # no object ever touches the edge


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_radius_have_one_area(shape):
    x = torch.arange(64.0) / 4 - 8
    area = coverage(shape, x[None], x[:, None], torch.tensor(4.0), scale=4.0).sum() / 16
    assert abs(area / (math.pi * 16) - 1) < 0.01


def test_the_renderer_draws_what_the_prompt_says():
    video = render([parse("a small red circle staying still on a white background")])[0]
    assert torch.allclose(video[0, :, 0, 0], BACKGROUND_RGB[2])
    assert torch.equal(video[0], video[-1])
    painted = ((video[0] - COLOR_RGB[0][:, None, None]).abs().sum(0) < 1e-5).sum() / 4
    assert 13 < painted < 29  # square units: pi 2.8^2 = 25, less the soft edge


def test_objects_do_not_touch():
    scenes = [
        parse(p)
        for p in ("three red squares", "two blue triangles", "three cyan crosses", "a red square and a blue square")
    ]
    specs = SceneSpecs.from_scenes(scenes * 50)
    layout = lay_out(specs, torch.Generator().manual_seed(1))
    layout.background[:] = 0
    together = render_layout(layout, num_frames=5)
    alone = torch.zeros_like(together)
    for slot in range(3):
        one = layout[:]
        one.present = torch.zeros_like(layout.present)
        one.present[:, slot] = layout.present[:, slot]
        alone += ((render_layout(one, num_frames=5) - BACKGROUND_RGB[0, 0]).abs().amax(2, keepdim=True) > 1e-4).float()
    assert alone.max() == 1


@pytest.mark.parametrize(
    ("relation", "axis", "sign"),
    [("to the left of", 0, 1), ("to the right of", 0, -1), ("above", 1, 1), ("below", 1, -1)],
)
def test_relations_hold_from_first_to_last_frame(relation, axis, sign):
    specs = SceneSpecs.from_scenes([parse(f"a red circle {relation} a blue square")] * 100)
    layout = lay_out(specs)
    start = (layout.start[:, 1] - layout.start[:, 0])[:, axis] * sign
    end = start + 16 * (layout.velocity[:, 1] - layout.velocity[:, 0])[:, axis] * sign
    assert (start > 5).all() and (end > 5).all()


def test_the_seed_decides_and_other_sizes_show_the_same():
    scenes = sample_scenes(8, "train", seed=4)
    videos = render(scenes, seed=1)
    assert torch.equal(videos, render(scenes, seed=1)) and not torch.equal(videos, render(scenes, seed=2))
    pooled = torch.nn.functional.avg_pool2d(render(scenes, seed=1, size=128).flatten(0, 1), 2).view_as(videos)
    assert (pooled - videos).abs().mean() < 0.002
    assert torch.allclose(render(scenes, seed=1, num_frames=33)[:, ::2], videos, atol=1e-4)


def test_layouts_do_not_depend_on_how_many_are_drawn_at_once():
    specs, layout = sample_layouts(20, "train", generator=torch.Generator().manual_seed(0))
    whole = render_layout(layout, num_frames=4)
    assert len(specs) == len(layout) == 20
    assert torch.equal(whole, torch.cat([render_layout(layout[i : i + 1], num_frames=4) for i in range(20)]))


def test_bad_arguments_are_named():
    scenes = [parse("a red circle")]
    with pytest.raises(ValueError, match="scenes is empty"):
        render([])
    with pytest.raises(ValueError, match="size=48"):
        render(scenes, size=48)
    with pytest.raises(ValueError, match="num_frames=3"):
        render(scenes, num_frames=3)


def test_scenes_without_room_are_refused():
    crowd = "three large red circles to the left of three large blue squares"
    with pytest.raises(ValueError, match=crowd):
        render([parse("a red circle"), parse(crowd)])
    assert search_layout(SceneSpecs.from_scenes([parse("a red circle"), parse(crowd)]))[1].tolist() == [True, False]
