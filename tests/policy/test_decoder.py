"""How the VAE decodes: slices change nothing, its dtype may differ, and what it cannot do is refused."""

import functools

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from policy.adapted import give_adapter
from policy.test_replay_parity import PROMPTS
from tiny_pipelines import BUILD, CALLS, CONDITIONS, quiet

from pisces_rl.policy import PolicyError, VideoPolicy


def sampled(family: str, **settings):
    policy = VideoPolicy(quiet(BUILD[family]()), num_inference_steps=2, pipeline_kwargs=CALLS[family], **settings)
    return policy, policy.sample(
        PROMPTS, noise_seeds=[1, 2], step_seeds=[3, 4], steps=[0], conditions=CONDITIONS[family]
    )


@pytest.mark.parametrize("family", ["wan", "cogvideox", "ltx", "hunyuan", "animatediff", "sana_video", "qwen_image"])
def test_slices_change_nothing(family):
    policy, sliced = sampled(family, vae_slicing=True)
    assert policy.pipeline.vae.use_slicing
    whole = sampled(family)[1]
    torch.testing.assert_close(sliced.videos, whole.videos, atol=2e-5, rtol=0)
    assert torch.equal(sliced.log_probs, whole.log_probs)


def test_slices_are_decoded_one_video_at_a_time():
    policy = VideoPolicy(quiet(BUILD["wan"]()), num_inference_steps=2, pipeline_kwargs=CALLS["wan"], vae_slicing=True)
    rows = []
    hook = policy.pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    policy.sample(PROMPTS, noise_seeds=[1, 2])
    hook.remove()
    assert rows and set(rows) == {1}


@pytest.mark.parametrize("family", ["wan", "wan22_ti2v", "wan_i2v"])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_chunks_change_nothing(family, frames):
    """The clip is longer than two chunks; TI2V's VAE has patches and shortcuts that begin differently."""
    longer = CALLS[family] | {"num_frames": 17}
    policies = [
        VideoPolicy(quiet(BUILD[family]()), num_inference_steps=2, pipeline_kwargs=longer, vae_chunk_frames=f)
        for f in (None, frames)
    ]
    whole, chunked = (p.sample(PROMPTS, noise_seeds=[1, 2], conditions=CONDITIONS[family]).videos for p in policies)
    assert whole.shape[1] == 17
    torch.testing.assert_close(chunked, whole, atol=2e-6, rtol=0)


def test_chunks_have_the_set_length_and_only_without_gradients():
    policy = VideoPolicy(
        quiet(BUILD["wan"]()),
        num_inference_steps=2,
        vae_chunk_frames=4,
        pipeline_kwargs=CALLS["wan"] | {"num_frames": 25},
    )
    give_adapter(dict(policy.denoiser.items()))
    lengths = []
    hook = policy.pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
    policy.sample(PROMPTS[:1], noise_seeds=[1])
    assert lengths == [1, 4, 2]
    lengths.clear()
    policy.sample_with_gradients(PROMPTS[:1], noise_seeds=[1])
    hook.remove()
    assert set(lengths) == {1}
    VideoPolicy(policy.pipeline, num_inference_steps=2)
    assert "_decode" not in vars(policy.pipeline.vae)  # another policy of the same pipeline


def test_cudnn_times_its_kernels_only_while_the_vae_decodes():
    how = dict(num_inference_steps=2, vae_chunk_frames=2, pipeline_kwargs=CALLS["wan"])
    plain, timed = (VideoPolicy(quiet(BUILD["wan"]()), vae_cudnn_benchmark=on, **how) for on in (False, True))
    while_decoding = []
    for policy in (plain, timed):
        policy.pipeline.vae.decoder.register_forward_pre_hook(
            lambda *_: while_decoding.append(torch.backends.cudnn.benchmark)
        )
    videos = [policy.sample(PROMPTS, noise_seeds=[1, 2]).videos for policy in (plain, timed)]
    half = len(while_decoding) // 2
    assert while_decoding == [False] * half + [True] * half and half and not torch.backends.cudnn.benchmark
    torch.testing.assert_close(*videos, atol=2e-6, rtol=0)
    weight = timed.pipeline.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    VideoPolicy(timed.pipeline, **how)
    assert weight.is_contiguous()


@pytest.mark.slow
def test_a_compiled_decoder_decodes_the_same(monkeypatch):
    """Two batch sizes, each of a first, a second, a further and a last, shorter chunk; without the compiler of C++,
    which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    policies = [
        VideoPolicy(
            quiet(BUILD["wan"]()), num_inference_steps=2, pipeline_kwargs=CALLS["wan"] | {"num_frames": 33}, **how
        )
        for how in ({}, {"vae_chunk_frames": 3, "vae_compile": True})
    ]
    for count in (1, 2):
        whole, chunked = (p.sample(PROMPTS[:count], noise_seeds=[1, 2][:count]).videos for p in policies)
        torch.testing.assert_close(chunked, whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "family, how, message",
    [
        (
            "hunyuan",
            {"vae_chunk_frames": 2},
            "AutoencoderKLHunyuanVideo .* does not support it, only AutoencoderKLWan",
        ),
        ("wan", {"vae_chunk_frames": 0}, "vae_chunk_frames=0"),
        ("wan", {"vae_compile": True}, "vae_compile needs vae_chunk_frames"),
        ("wan", {"vae_cudnn_benchmark": True, "vae_tiling": True}, "vae_cudnn_benchmark needs vae_chunk_frames"),
        ("wan", {"vae_chunk_frames": 2, "vae_tiling": True}, "does not work with vae_tiling"),
    ],
)
def test_chunks_that_cannot_be(family, how, message):
    with pytest.raises(PolicyError, match=message):
        VideoPolicy(quiet(BUILD[family]()), num_inference_steps=2, **how)


def test_tiles_are_switched_on():
    policy, tiled = sampled("wan", vae_tiling=True)
    assert policy.pipeline.vae.use_tiling
    assert torch.equal(tiled.videos, sampled("wan")[1].videos)  # smaller than a tile


@pytest.mark.parametrize("family", ["wan", "cogvideox", "mochi", "latte", "ltx_i2v", "cogvideox_i2v"])
def test_the_vae_may_have_another_dtype(family):
    """Also if the pipeline passes it latents or images in the denoiser's dtype."""
    policy, half = sampled(family, vae_dtype="bfloat16")
    assert policy.pipeline.vae.dtype == torch.bfloat16 and policy.denoiser[next(iter(policy.denoiser))].dtype == (
        torch.float32
    )
    whole = sampled(family)[1]
    assert half.videos.dtype == torch.float32
    assert 0 < float((half.videos - whole.videos).abs().max()) < 0.2
    if not CONDITIONS[family]:
        assert torch.equal(half.log_probs, whole.log_probs)


def test_gradients_pass_through_a_vae_of_another_dtype():
    policy = VideoPolicy(
        quiet(BUILD["wan"]()), num_inference_steps=2, pipeline_kwargs=CALLS["wan"], vae_dtype="bfloat16"
    )
    weight = policy.denoiser["transformer"].proj_out.weight
    policy.requires_grad_(False)
    weight.requires_grad_()
    policy.sample_with_gradients(PROMPTS, noise_seeds=[1, 2]).sum().backward()
    assert float(weight.grad.abs().max()) > 0


def test_the_pipeline_is_as_it_was_after_a_sample():
    policy, _ = sampled("wan", vae_dtype="bfloat16")
    assert not {"decode", "encode"} & vars(policy.pipeline.vae).keys()


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("wan", {"vae_dtype": "half"}, r"vae_dtype='half' must be one of \['float32', 'bfloat16'\]"),
        (
            "easyanimate",
            {"vae_slicing": True},
            "vae_slicing=True, but AutoencoderKLMagvit of EasyAnimatePipeline does not",
        ),
    ],
)
def test_impossible_requests_are_refused(family, settings, message):
    with pytest.raises(PolicyError, match=message):
        VideoPolicy(quiet(BUILD[family]()), num_inference_steps=2, pipeline_kwargs=CALLS[family], **settings)


def test_a_vae_without_tiles():
    pipe = quiet(BUILD["t2v_sd"]())
    pipe.vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,))
    with pytest.raises(
        PolicyError, match="vae_tiling=True, but AutoencoderKLTemporalDecoder .* does not support it; leave"
    ):
        VideoPolicy(pipe, num_inference_steps=2, pipeline_kwargs=CALLS["t2v_sd"], vae_tiling=True)
