from collections import Counter

import pytest
import torch

from pisces_rl.shapemotion import (
    FAMILIES,
    SPLITS,
    VOCABULARY,
    family_of,
    held_out,
    lay_out,
    parse,
    sample_layouts,
    sample_scenes,
    split_of,
)
from pisces_rl.shapemotion.specs import HELD_OUT_COLORS_OF_SHAPE, HELD_OUT_MOTIONS_OF_SHAPE
from pisces_rl.shapemotion.splits import _propose

HELD_OUT = {
    "train": (False, False),
    "test_seen": (False, False),
    "test_color_shape": (True, False),
    "test_shape_motion": (False, True),
    "test_both": (True, True),
}


@pytest.fixture(scope="module")
def scenes():
    return {split: sample_scenes(3000, split, seed=3) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_holds_the_pairs_it_promises(scenes, split):
    assert {held_out(scene) for scene in scenes[split]} == {HELD_OUT[split]}
    assert {split_of(scene) for scene in scenes[split][:300]} == {split}


def test_splits_share_no_prompt(scenes):
    owner = {}
    for split, drawn in scenes.items():
        for scene in drawn:
            assert owner.setdefault(scene.prompt(), split) == split


@pytest.mark.parametrize("split", SPLITS)
def test_families_are_all_there_and_equally_often(scenes, split):
    counts = Counter(map(family_of, scenes[split]))
    assert set(counts) == set(SPLITS[split])
    assert min(counts.values()) > 0.8 * len(scenes[split]) / len(counts)


def test_training_is_not_impoverished(scenes):
    prompts = {scene.prompt() for scene in scenes["train"]}
    assert {word for prompt in prompts for word in prompt.split()} == set(VOCABULARY[3:])
    assert {"a circle", "a square", "a triangle", "a cross"} <= prompts
    # of the 20 prompts like "a red circle" that name no held-out pair, most stay for training
    colored = {prompt for prompt in prompts if len(prompt.split()) == 3 and prompt.startswith("a ")}
    assert 11 <= len(colored) <= 15


def test_test_seen_takes_about_a_third():
    proposed = _propose(torch.full((8000,), FAMILIES.index("full")), torch.Generator().manual_seed(0))
    share = (proposed.hash() % 3 == 0).float().mean()
    assert len(proposed.hash().unique()) > 7500 and abs(share - 1 / 3) < 0.02


def test_the_split_of_a_prompt_never_changes():
    # another hash would mix what earlier runs trained with what later ones test
    for prompt in ("a cyan triangle", "a yellow circle", "a large red cross", "a cyan cross"):
        assert split_of(parse(prompt)) == "test_seen"
    for prompt in ("a circle", "a cyan triangle growing", "two red squares", "a yellow cross above a red square"):
        assert split_of(parse(prompt)) == "train"


def test_training_clips_never_show_a_held_out_pair():
    for family in FAMILIES:
        specs, layout = sample_layouts(400, "train", (family,), torch.Generator().manual_seed(7))
        for drawn in (layout, lay_out(specs, torch.Generator().manual_seed(8))):
            shape = drawn.shape[drawn.present]
            assert not HELD_OUT_COLORS_OF_SHAPE[shape, drawn.color[drawn.present]].any()
            assert not HELD_OUT_MOTIONS_OF_SHAPE[shape, drawn.motion[drawn.present]].any()


def test_draws_are_decided_by_the_seed():
    assert sample_scenes(50, "train", seed=1) == sample_scenes(50, "train", seed=1)
    assert sample_scenes(50, "train", seed=1) != sample_scenes(50, "train", seed=2)
    assert {family_of(scene) for scene in sample_scenes(20, "test_seen", 0, "speed")} == {"speed"}


@pytest.mark.parametrize(
    ("split", "family", "message"),
    [
        ("tran", None, "did you mean 'train'"),
        ("test_sean", None, "did you mean 'test_seen'"),
        ("train", "colour", "did you mean 'color'"),
        ("test_seen", "object_class", "does not have"),
        ("test_shape_motion", "color", "does not have"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(split, family, message):
    with pytest.raises(ValueError, match=message):
        sample_scenes(4, split, family=family)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="n=0"):
        sample_scenes(0)
    with pytest.raises(ValueError, match="families='color'"):
        sample_layouts(4, "train", "color")
