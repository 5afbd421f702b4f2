"""A stranger's pipeline encodes pictures or objects with the prompt: what is remembered belongs to these, too."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from tiny_pipelines import BUILD, picture, quiet

from pisces_rl.policy import PolicyError, VideoPolicy
from pisces_rl.policy.pipeline.prompts import PromptMemo, content_key


class Encoder:
    """An encode_prompt whose embedding (1, 2, 3) encodes the prompt and the mean of the image; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompt, image=None, negative_prompt=None, style=None):
        self.calls += 1
        pixels = 0.0 if image is None else float(np.asarray(image, dtype=float).mean())
        rows = [[len(text), pixels, self.calls if style else 0.0] for text in prompt]
        return torch.tensor(rows)[:, None].repeat(1, 2, 1), None


def embedding(memo, *args, **kwargs):
    return memo(*args, **kwargs)[0][:, 0].tolist()


def test_another_picture_has_another_embedding():
    """Two hundred pictures, the address of each taken again by the next: each call must see its own."""
    memo = PromptMemo(encoder := Encoder())
    for seed in range(200):
        image = picture(seed, 8)
        assert embedding(memo, ["a"], image=image) == embedding(encoder, ["a"], image=image)
        del image


def test_the_same_pixels_are_encoded_once():
    """A dataset opens its picture anew for each epoch."""
    memo = PromptMemo(encoder := Encoder())
    assert embedding(memo, ["a"], image=picture(1)) == embedding(memo, ["a"], image=picture(1))
    assert encoder.calls == 1


def test_a_picture_that_is_painted_over():
    """The same object with other pixels is another picture."""
    memo, image = PromptMemo(Encoder()), picture(1)
    before = embedding(memo, ["a"], image=image)
    image.paste((0, 0, 0), (0, 0, 24, 24))
    assert embedding(memo, ["a"], image=image) != before


def test_arrays_and_tensors_by_all_their_values():
    """repr() shows the edge of a large array only."""
    memo = PromptMemo(Encoder())
    for zeros in (np.zeros((64, 64, 3)), torch.zeros(64, 64, 3), [torch.zeros(64, 64, 3)]):
        before = embedding(memo, ["a"], image=zeros)
        (zeros[0] if isinstance(zeros, list) else zeros)[30, 30] = 99.0
        assert embedding(memo, ["a"], image=zeros) != before


def test_what_has_no_contents_to_compare_is_encoded_each_time():
    """An object may change within, or its address may be another's next time."""
    memo = PromptMemo(encoder := Encoder())
    for _ in range(3):
        memo(["a"], style=object())
    assert encoder.calls == 3 and not memo.memory


def test_what_the_pipeline_changes_in_place_is_not_what_is_remembered():
    """A pipeline scales its embeddings in place."""
    memo = PromptMemo(Encoder())
    first = memo(["ab"])[0]
    first.mul_(0)
    assert embedding(memo, ["ab"])[0][0] == 2.0


def test_what_is_common_to_a_batch_is_a_copy():
    """Ids of text positions, the same tensor for every prompt, and a pipeline that adds to them in place."""

    def encode_prompt(prompt):
        return torch.zeros(len(prompt), 2, 3), torch.arange(2.0)

    memo = PromptMemo(encode_prompt)
    memo(["a", "b"])[1].add_(5)
    assert memo(["a", "b"])[1].tolist() == [0, 1]


def test_pictures_of_a_batch_stay_with_their_prompts():
    """The pipeline matches a list of pictures with a list of prompts."""
    seen = []

    def encode_prompt(prompt, image=None):
        seen.append((prompt, image))
        return torch.zeros(len(prompt), 2, 3)

    pictures = [picture(0), picture(1)]
    PromptMemo(encode_prompt)(["a", "b"], image=pictures)
    assert seen == [(["a", "b"], pictures)]


def test_each_prompt_keeps_its_own_second_prompt():
    """Flux and SD3 take further prompts, one for each."""

    def encode_prompt(prompt, prompt_2=None):
        return torch.tensor([[[float(len(a)), float(len(b))]] for a, b in zip(prompt, prompt_2, strict=True)])

    memo = PromptMemo(encode_prompt)
    assert memo(["a", "bb"], prompt_2=["ccc", "dddd"])[:, 0].tolist() == [[1, 3], [2, 4]]
    with pytest.raises(PolicyError, match="negative_prompt has 1 values for 2 prompts"):
        PromptMemo(Encoder())(["a", "b"], negative_prompt=["c"])


def test_keys_differ_where_contents_do():
    """1 and True, a picture and its transpose, a palette's colours: equal bytes, other contents."""
    wide, palette = Image.new("L", (2, 3)), Image.new("P", (2, 3))
    other = palette.copy()
    other.putpalette([9] * 768)
    values = [
        1,
        True,
        1.0,
        "1",
        None,
        [1],
        (1,),
        {"a": 1},
        wide,
        Image.new("L", (3, 2)),
        palette,
        other,
        np.zeros(2),
        np.zeros(2, np.int64),
        torch.zeros(2),
        torch.zeros(1, 2),
        torch.zeros(2, dtype=torch.half),
    ]
    keys = [content_key(value) for value in values]
    assert None not in keys and len(set(keys)) == len(keys)
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key([1, object()]) is None


class PicturedWan(WanPipeline):
    """Wan whose text embeddings are moved by a picture's mean, as a vision-language encoder's are."""

    def encode_prompt(self, prompt, image=None, **kwargs):  # and through **kwargs, which the memory must pass on
        embeds, negative = super().encode_prompt(prompt, **kwargs)
        return embeds if image is None else embeds + float(np.asarray(image).mean()) / 50, negative

    def __call__(self, image, prompt, generator=None, output_type="pt", num_inference_steps=4, **size):
        embeds, _ = self.encode_prompt(prompt, image=image, do_classifier_free_guidance=False, max_sequence_length=16)
        call = dict(prompt_embeds=embeds, guidance_scale=1.0, height=16, width=16, num_frames=9)
        return inspect.unwrap(WanPipeline.__call__)(
            self, generator=generator, output_type=output_type, num_inference_steps=num_inference_steps, **call
        )


def test_each_video_is_made_from_its_own_picture():
    """One prompt, a dark and a light picture: two videos, in sampling and in replay."""
    wan = quiet(BUILD["wan"]())
    policy = VideoPolicy(
        quiet(PicturedWan(**{k: v for k, v in wan.components.items() if not k.endswith("_2")})), num_inference_steps=3
    )
    pictures = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (0, 200)]
    seeds = dict(noise_seeds=[0, 0], step_seeds=[1, 1], steps=[0])
    rollout = policy.sample(["a", "a"], conditions={"image": pictures}, **seeds)
    assert not torch.allclose(rollout.videos[0], rollout.videos[1], atol=1e-3)
    errors = []
    policy.replay(rollout, [1, 0], lambda s: errors.append((s.log_prob - rollout.log_probs[s.rows, 0]).abs().max()))
    assert len(errors) == 2 and max(errors) == 0
