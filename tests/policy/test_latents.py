"""Videos to latents: the inverse of what each pipeline does before it decodes."""

import pytest
import torch
from policy.test_replay_parity import adapted
from tiny_pipelines import BUILD, CALLS, CONDITIONS, GUIDANCE, quiet

from pisces_rl.policy import PolicyError, VideoPolicy
from pisces_rl.policy.pipeline.latents import LatentCodec, _Probe


def build(family: str) -> VideoPolicy:
    return VideoPolicy(adapted(family), num_inference_steps=3, pipeline_kwargs=CALLS[family] | GUIDANCE[family][1])


@pytest.mark.parametrize("family", BUILD)
def test_what_is_decoded_is_what_was_encoded(family):
    policy = build(family)
    conditions = {name: values[:1] for name, values in CONDITIONS[family].items()}
    shape = policy.sample(["a"], noise_seeds=[0], conditions=conditions).videos.shape
    videos = torch.rand(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    codec = LatentCodec.of(policy, conditions=conditions)
    latents = codec.encode(policy.pipeline, videos)
    assert latents.shape[0] == 2 * codec.shape[0] and latents.shape[1:] == codec.shape[1:]
    for row, video in enumerate(videos):
        x = video[None] * 2 - 1
        x = x.flatten(0, 1) if codec.by_frame else x.transpose(1, 2)
        with torch.no_grad():
            z = policy.pipeline.vae.encode(x).latent_dist.mode()
        own = latents[row * codec.shape[0] : (row + 1) * codec.shape[0]]
        decoded = _Probe.run(policy, "", own, conditions).z
        torch.testing.assert_close(decoded.flatten()[codec.free], z.flatten()[codec.free], rtol=1e-4, atol=1e-4)
    if family == "ltx_i2v":  # its first latent frame is the image's
        assert not codec.free.view(codec.encoded)[:, 0].any() and codec.free.view(codec.encoded)[:, 1:].all()
    else:
        assert codec.free.all()
    assert "decode" not in vars(policy.pipeline.vae)


def test_videos_of_another_size():
    policy = build("wan")
    shape = policy.sample(["a"], noise_seeds=[0]).videos.shape
    codec, video = LatentCodec.of(policy), torch.rand(2 * shape[1], 3, 2 * shape[3], shape[4])
    with pytest.raises(ValueError, match="videos: expected"):
        codec.encode(policy.pipeline, video[None])
    fitted = codec.fitted(video)
    assert fitted.shape == shape[1:] == codec.video and 0 <= fitted.min() and fitted.max() <= 1
    torch.testing.assert_close(codec.fitted(fitted), fitted)


def test_the_scale_in_bf16():
    """A single probe is rounded; the slope over many is the scale."""
    pipe = quiet(BUILD["wan"]()).to(torch.bfloat16)
    policy = VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["wan"] | GUIDANCE["wan"][1])
    codec = LatentCodec.of(policy)
    generator = torch.Generator().manual_seed(0)
    products, squares = torch.zeros_like(codec.scale), torch.zeros_like(codec.scale)
    for _ in range(30):
        x = torch.randn(codec.shape, generator=generator).bfloat16().float()
        z = _Probe.run(policy, "", x).z.flatten()
        x = x.flatten()[codec.source]
        products += x * (z - codec.offset)
        squares += x.square()
    torch.testing.assert_close(codec.scale, products / squares, rtol=5e-3, atol=0)


def test_a_pipeline_that_mixes_its_latents(monkeypatch):
    run = _Probe.run

    def mixed(*arguments):
        probe = run(*arguments)
        probe.seen = [z + z.roll(1, -1) for z in probe.seen]
        return probe

    monkeypatch.setattr(_Probe, "run", mixed)
    with pytest.raises(PolicyError, match="more than reorder and rescale"):
        LatentCodec.of(build("wan"))
