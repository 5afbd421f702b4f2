import pytest

from pisces_rl.shapemotion import SPLITS, load_prompts, parse, render, split_of


def test_rows_say_what_the_prompt_says():
    data = load_prompts("train", 200, seed=1)
    assert len(data) == 200 and data.column_names[0] == "prompt"
    for row in data:
        scene = parse(row["prompt"])
        assert row["shapes"] == [g.shape for g in scene.groups] and row["counts"] == [g.count for g in scene.groups]
        assert row["colors"] == [g.color for g in scene.groups] and row["motions"] == [g.motion for g in scene.groups]
        assert (row["relation"], row["background"]) == (scene.relation, scene.background)
        assert row["split"] == split_of(scene) == "train"


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_can_be_rendered(split):
    prompts = load_prompts(split, 120, seed=9)["prompt"]
    assert len(render([parse(prompt) for prompt in prompts], seed=4, size=32, num_frames=4)) == 120


def test_the_arguments_decide():
    first = load_prompts("test_seen", 30, seed=1)
    assert first["prompt"][:] == load_prompts("test_seen", 30, seed=1)["prompt"][:]
    assert first["prompt"][:] != load_prompts("test_seen", 30, seed=2)["prompt"][:]
    assert set(load_prompts("train", 30, families=["color", "speed"])["family"]) == {"color", "speed"}


def test_unknown_names():
    with pytest.raises(ValueError, match="split='training'.*did you mean 'train'"):
        load_prompts("training", 4)
    with pytest.raises(ValueError, match="'sped'.*did you mean 'speed'"):
        load_prompts("train", 4, families=["sped"])
    with pytest.raises(ValueError, match="n=0"):
        load_prompts("train", 0)
