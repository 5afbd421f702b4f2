"""Arguments of a pipeline's call that a stranger got wrong: a sentence that says so, not a shape error or silence."""

import pytest
import torch
from tiny_pipelines import BUILD, CALLS, quiet

from pisces_rl.policy import PolicyError, VideoPolicy, add_lora, default_lora_config
from pisces_rl.trainers import VideoGRPOConfig


@pytest.fixture
def wan():
    return quiet(BUILD["wan"]())


def policy(pipe, **call):
    return VideoPolicy(pipe, num_inference_steps=2, pipeline_kwargs=CALLS["wan"] | call)


WRONG = [
    ({"num_frames": 0}, "num_frames=0 must be a whole number of frames, at least 1"),
    ({"num_frames": -3}, "num_frames=-3 must be"),
    ({"num_frames": 16.5}, "num_frames=16.5 must be"),
    ({"num_frames": True}, "num_frames=True must be"),
    ({"height": -64}, "height=-64 must be a whole number of pixels, at least 1"),
    ({"width": 0}, "width=0 must be"),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_sizes_before_anything_is_loaded(tmp_path, call, message):
    """num_frames=0 made videos of one frame, height=-64 a reshape error."""
    with pytest.raises(ValueError, match=message):
        VideoGRPOConfig(output_dir=str(tmp_path), **call)
    with pytest.raises(ValueError, match=message):
        VideoGRPOConfig(output_dir=str(tmp_path), pipeline_kwargs=call)


@pytest.mark.parametrize("call, message", WRONG)
def test_sizes_of_a_policy(wan, call, message):
    """The same by hand, without a trainer."""
    with pytest.raises(PolicyError, match=message):
        policy(wan, **call)


def test_frames_that_the_pipeline_rounds(wan):
    """Wan makes 5 frames of 6, with a line in its log that training hides."""
    with pytest.raises(PolicyError, match="num_frames=6, but WanPipeline rounds it and made 5. Set num_frames=5"):
        policy(wan, num_frames=6).sample(["a"], noise_seeds=[0])
    add_lora({"transformer": wan.transformer}, default_lora_config(4))
    with pytest.raises(PolicyError, match="num_frames=6, but WanPipeline rounds it"):
        policy(wan, num_frames=6).sample_with_gradients(["a"], noise_seeds=[0])


def test_odd_sizes(wan):
    """The pipeline's own sentence, which names the argument and the number."""
    with pytest.raises(ValueError, match="`height` and `width` have to be divisible by 16 but are 17 and 16"):
        policy(wan, height=17).sample(["a"], noise_seeds=[0])


@pytest.mark.parametrize("value", [["blurry"], ["blurry"] * 3, [], ("blurry", "dark")])
def test_negative_prompts_in_a_list(tmp_path, wan, value):
    """One for a batch of two was an IndexError; and a replay of the second video took the first one's."""
    with pytest.raises(PolicyError, match="negative_prompt=.* is a list, but .*Give one string"):
        policy(wan, negative_prompt=value)
    with pytest.raises(ValueError, match="negative_prompt=.* is a list"):
        VideoGRPOConfig(output_dir=str(tmp_path), pipeline_kwargs={"negative_prompt": value})


def test_a_negative_prompt_for_each_video(wan):
    """What the message offers: a string for all, or a condition of each video."""
    own = policy(wan).sample(["a", "b"], noise_seeds=[0, 1], conditions={"negative_prompt": ["blurry", "dark"]}).videos
    for row, negative in enumerate(("blurry", "dark")):
        alone = policy(wan, negative_prompt=negative).sample([["a", "b"][row]], noise_seeds=[row]).videos
        torch.testing.assert_close(own[row : row + 1], alone, rtol=1e-4, atol=1e-4)
