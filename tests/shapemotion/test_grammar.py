import pytest

from pisces_rl.shapemotion import SPLITS, VOCABULARY, Group, Scene, held_out, parse, sample_scenes
from pisces_rl.shapemotion.specs import SceneSpecs

# the tokens of the shipped tiny-wan's tokenizer, in the order of their ids
TOKENS = (
    "<pad> </s> <unk> a above and background below black blue circle circles cross crosses cyan down gray green "
    "growing large left moving of on purple quickly red right shrinking slowly small square squares staying still "
    "the three to triangle triangles two up white yellow"
).split()


def test_vocabulary_is_that_of_the_shipped_tokenizer():
    assert list(VOCABULARY) == TOKENS


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_parsed_back(split):
    scenes = sample_scenes(500, split, seed=1)
    prompts = [scene.prompt() for scene in scenes]
    assert [parse(prompt) for prompt in prompts] == scenes
    assert SceneSpecs.from_scenes(scenes).scenes() == scenes
    assert {word for prompt in prompts for word in prompt.split()} <= set(VOCABULARY)
    assert max(len(prompt.split()) for prompt in prompts) < 24  # and "</s>" fits the tokenizer's 24


def test_a_long_prompt_says_what_it_says():
    prompt = "two small red crosses moving left slowly to the right of a cyan square growing on a gray background"
    first = Group("cross", 2, "small", "red", "moving left", "slowly")
    scene = Scene((first, Group("square", color="cyan", motion="growing")), "to the right of", "gray")
    assert parse(prompt) == scene and scene.prompt() == prompt
    assert parse("  A Red   CIRCLE ") == Scene((Group("circle", color="red"),))


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("", "empty"),
        ("   ", "empty"),
        (None, "empty"),
        ("red circle", "'red'"),
        ("a pink circle", "'pink'"),
        ("a circles", "'circles'"),
        ("two circle", "'circle'"),
        ("a red circle flying", "'flying'"),
        ("a red circle moving", "'moving'"),
        ("a red circle growing slowly", "'slowly'"),
        ("a red circle and", "its end"),
        ("a red circle near a blue square", "'near'"),
        ("a red circle on a green background", "'green'"),
        ("a red circle on a gray", "its end"),
        ("a red circle on a gray background now", "'now'"),
        ("a red circle and a red square", "two different colors"),
        ("a circle and a red square", "two different colors"),
    ],
)
def test_what_is_outside_the_grammar_is_named(prompt, word):
    with pytest.raises(ValueError) as error:
        parse(prompt)
    assert repr(prompt) in str(error.value) and word in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Group("star"),
        lambda: Group("circle", 4),
        lambda: Group("circle", color="pink"),
        lambda: Group("circle", speed="slowly"),
        lambda: Group("circle", motion="growing", speed="slowly"),
        lambda: Scene(()),
        lambda: Scene((Group("circle"),), "and"),
        lambda: Scene((Group("circle", color="red"), Group("circle", color="blue")), None),
        lambda: Scene((Group("circle"),), None, "pink"),
    ],
)
def test_scenes_outside_the_grammar_are_refused(make):
    with pytest.raises(ValueError, match="allowed|needs"):
        make()


def test_held_out_pairs():
    assert held_out(parse("a red triangle moving left")) == (True, False)
    assert held_out(parse("a red circle moving up")) == (False, True)
    assert held_out(parse("a blue circle moving up")) == (True, True)
    assert held_out(parse("a red circle and a green triangle moving up")) == (False, False)
