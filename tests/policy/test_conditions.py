"""What a video is conditioned on stays with it: through batches, slices and joins."""

import pytest
import torch
from policy.test_replay_parity import PROMPTS, adapted, seeded
from tiny_pipelines import BUILD, CALLS, CONDITIONS, quiet

from pisces_rl.policy import PolicyError, Rollout, VideoPolicy

I2V = [family for family in BUILD if CONDITIONS[family]]


def policy_of(family: str) -> VideoPolicy:
    return VideoPolicy(adapted(family), num_inference_steps=3, pipeline_kwargs=CALLS[family])


def scores(policy: VideoPolicy, rollout: Rollout, rows: list[int]) -> dict[tuple, float]:
    found = {}
    policy.replay(
        rollout,
        rows,
        lambda s: found.update({(row, s.index): value for row, value in zip(s.rows, s.log_prob.tolist())}),
        grad=False,
    )
    return found


@pytest.mark.parametrize("family", I2V)
def test_two_videos_of_one_prompt_and_noise_differ_by_their_images(family):
    policy, (first, second) = policy_of(family), CONDITIONS[family]["image"]
    rollout = policy.sample(
        ["a fish"] * 3,
        noise_seeds=[1] * 3,
        step_seeds=[2] * 3,
        steps=[0, 1],
        conditions={"image": [first, second, first]},
    )
    assert rollout.conditions == {"image": [first, second, first]}
    torch.testing.assert_close(rollout.videos[0], rollout.videos[2], rtol=0, atol=0)
    assert not torch.equal(rollout.videos[0], rollout.videos[1])  # little: Wan's random image encoder sees little

    expected = {(row, step): float(rollout.log_probs[row, step]) for row in range(3) for step in (0, 1)}
    assert scores(policy, rollout, [2, 1]) == {k: v for k, v in expected.items() if k[0]}
    parts = [
        policy.sample([p], noise_seeds=[i], step_seeds=[i], steps=[0, 1], conditions={"image": [image]})
        for i, (p, image) in enumerate(zip(PROMPTS, (first, second)))
    ]
    joined = Rollout.cat(parts[::-1])
    assert joined.conditions == {"image": [second, first]}
    assert scores(policy, joined, [1])[1, 1] == pytest.approx(float(parts[0].log_probs[0, 1]), abs=1e-6)

    rollout.conditions["image"].reverse()  # the outer two change nothing: both are `first`
    rollout.conditions["image"][1] = first
    assert scores(policy, rollout, [0, 2]) == {k: v for k, v in expected.items() if k[0] != 1}
    swapped = scores(policy, rollout, [1])
    assert all(swapped[1, step] != expected[1, step] for step in (0, 1))


def test_the_first_latent_frame_of_ltx_is_the_image_s():
    """Only the others are steps of the policy: its states have one frame less."""
    policy = policy_of("ltx_i2v")
    rollout = policy.sample(PROMPTS, **seeded("ltx_i2v"), step_seeds=[3, 4], steps=[0, 1])
    plain = VideoPolicy(adapted("ltx"), num_inference_steps=3, pipeline_kwargs=CALLS["ltx"])
    tokens = plain.final_latents(PROMPTS, noise_seeds=[1, 2]).shape[1]
    frames, height, width = rollout.states[0].shape[2:]
    assert (frames + 1) * height * width == tokens
    other = policy.sample(PROMPTS, noise_seeds=[5, 6], conditions=CONDITIONS["ltx_i2v"])
    same = policy.sample(PROMPTS, noise_seeds=[5, 6], conditions=CONDITIONS["ltx_i2v"])
    torch.testing.assert_close(other.videos, same.videos, rtol=0, atol=0)


@pytest.mark.parametrize(
    "conditions, message",
    [
        ({"picture": [1, 2]}, "takes no argument 'picture'"),
        ({"num_frames": [5, 9]}, "takes no argument 'num_frames' that may differ"),
        ({"generator": [1, 2]}, "takes no argument 'generator' that may differ"),
        ({"guidance_scale": [1.0, 2.0]}, "'guidance_scale' is also in pipeline_kwargs"),
        ({"image": CONDITIONS["wan_i2v"]["image"][:1]}, "'image' has 1 values for 2 prompts"),
    ],
)
def test_conditions_that_do_not_fit(conditions, message):
    policy = policy_of("wan_i2v")
    for method in (policy.sample, policy.sample_with_gradients, policy.final_latents):
        with pytest.raises(PolicyError, match=message):
            method(PROMPTS, noise_seeds=[1, 2], conditions=conditions)
    with pytest.raises(PolicyError, match=message):
        policy.predict(Rollout(PROMPTS, [1, 2], None, [], conditions=conditions), [0, 1], noise_seeds=[1, 2], step=0)


def test_rollouts_of_different_conditions_are_not_joined():
    policy = VideoPolicy(adapted("wan"), num_inference_steps=3, pipeline_kwargs=CALLS["wan"])
    plain = policy.sample(["a"], noise_seeds=[0])
    guided = policy.sample(["a"], noise_seeds=[0], conditions={"negative_prompt": ["blurry"]})
    with pytest.raises(ValueError, match="different conditions"):
        Rollout.cat([plain, guided])
    assert not torch.allclose(plain.videos, guided.videos)


def test_a_number_that_differs_from_video_to_video():
    """Guidance changes how many rows the denoiser has, and a skipped step must know."""
    call = {k: v for k, v in CALLS["ltx"].items() if k != "guidance_scale"}
    policy = VideoPolicy(adapted("ltx"), num_inference_steps=4, pipeline_kwargs=call)
    rollout = policy.sample(
        PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[2], conditions={"guidance_scale": [1.0, 3.0]}
    )
    for row, value in enumerate(rollout.log_probs[:, 0].tolist()):
        assert scores(policy, rollout, [0, 1])[row, 2] == pytest.approx(value, abs=1e-6)


def test_one_negative_prompt_for_a_batch():
    """Flux takes a string as the negative prompt of one image only."""
    call = CALLS["flux"] | {"true_cfg_scale": 4.0, "negative_prompt": "blurry"}
    policy = VideoPolicy(adapted("flux"), num_inference_steps=3, pipeline_kwargs=call)
    both = policy.sample(PROMPTS, noise_seeds=[1, 2]).videos
    torch.testing.assert_close(both[1:], policy.sample(PROMPTS[1:], noise_seeds=[2]).videos, rtol=1e-4, atol=1e-4)


def test_what_is_common_to_a_batch_of_prompts_is_not_stacked():
    """Flux's encode_prompt returns ids of text positions, without a batch."""
    pipe = quiet(BUILD["flux"]())
    policy = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["flux"])
    arguments = dict(prompt=PROMPTS, prompt_2=None, max_sequence_length=16)
    with torch.no_grad():
        remembered, own = policy.prompt_memo(**arguments), pipe.encode_prompt(**arguments)
    for a, b in zip(remembered, own):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
