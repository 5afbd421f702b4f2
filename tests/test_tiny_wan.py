"""The embedded model: it loads, and the script that trains it runs and computes what the pipeline computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from pisces_rl.assets import asset_path, available
from pisces_rl.shapemotion import VOCABULARY, load_prompts, verify

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "assets_src"))

import muon  # noqa: E402
import tiny_wan_model  # noqa: E402
import train_tiny_wan  # noqa: E402
import whole_clip_vae  # noqa: E402


@pytest.fixture(scope="module")
def shipped() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(asset_path("tiny-wan"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_asset_names():
    assert "tiny-wan" in available()
    assert (asset_path("tiny-wan") / "model_index.json").exists()
    with pytest.raises(ValueError, match="tiny-wan"):
        asset_path("tiny_wan")


def test_shipped_parts_are_what_the_script_builds(shipped):
    built = {
        "vae": tiny_wan_model.build_vae(),
        "transformer": tiny_wan_model.build_transformer(),
        "text_encoder": tiny_wan_model.build_text_encoder(),
    }
    for name, module in built.items():
        wanted = {k: v.shape for k, v in getattr(shipped, name).state_dict().items()}
        assert {k: v.shape for k, v in module.state_dict().items()} == wanted, name
    prompts = list(load_prompts("train", 64)["prompt"]) + ["", "a RED Circle", "a dog"]
    tokenizer = tiny_wan_model.build_tokenizer()
    assert tokenizer(prompts)["input_ids"] == shipped.tokenizer(prompts)["input_ids"]
    assert list(tokenizer.convert_ids_to_tokens(range(len(VOCABULARY)))) == list(VOCABULARY)
    assert shipped.scheduler.config.shift == tiny_wan_model.SHIFT


def test_shipped_model_follows_prompts(shipped):
    """A floor far below its scores: 16 one-object prompts, 8 steps."""
    prompts = list(load_prompts("train", 16, seed=5, families=["color", "scene"])["prompt"])
    videos = shipped(
        prompts,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=8,
        guidance_scale=1.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    result = verify(videos.float().clamp(0, 1), prompts)
    assert result.alignment.mean() > 0.6 and result.correct.mean() > 0.3


@pytest.mark.slow
def test_whole_clip_vae_equals_diffusers(shipped):
    """Numbers and gradients, in the layout that training uses, too."""
    vae = shipped.vae
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(2, 3, 17, 64, 64, generator=generator) * 2 - 1
    weight = vae.encoder.conv_in.weight
    for layout in (lambda m: m, whole_clip_vae.channels_last):
        layout(vae)
        moments = vae.encode(videos).latent_dist.parameters
        decoded = vae.decode(moments[:, :16]).sample
        (wanted,) = torch.autograd.grad(decoded.square().mean(), weight)
        fast = whole_clip_vae.encode(vae, videos)
        fast_decoded = whole_clip_vae.decode(vae, fast[:, :16]).clamp(-1, 1)
        (gradient,) = torch.autograd.grad(fast_decoded.square().mean(), weight)
        torch.testing.assert_close(fast, moments, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(fast_decoded, decoded, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, wanted, atol=1e-3 * wanted.abs().max().item(), rtol=1e-2)


def test_training_sees_the_text_that_the_pipeline_sees(shipped):
    """Token ids and blanked padding as in WanPipeline.encode_prompt; an empty caption is a dropped one."""
    prompts = ["a red circle", "two small blue squares moving left slowly", ""]
    tokens = train_tiny_wan.tokenise(shipped.tokenizer, prompts)
    mask = (tokens > 0).long()
    with torch.no_grad():
        ours = shipped.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        theirs, _ = shipped.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=24)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_shipped_model_has_a_low_training_loss(shipped):
    """The loss of the script, on fresh clips, near the .27 that training ended with; untrained it is about 2."""
    torch.manual_seed(0)
    clips = train_tiny_wan.Clips(torch.device("cpu"), seed=3, layouts=16)
    latents, specs = train_tiny_wan.encode_clips(shipped.vae, clips, 16)
    shape = (1, 16, 1, 1, 1)
    mean, deviation = (torch.tensor(shipped.vae.config[k]).view(shape) for k in ("latents_mean", "latents_std"))
    tokens = train_tiny_wan.tokenise(shipped.tokenizer, [scene.prompt() for scene in specs.scenes()])
    latents = (latents - mean) / deviation
    with torch.no_grad():
        loss = train_tiny_wan.flow_loss(shipped.transformer, shipped.text_encoder, latents, tokens)
    assert loss < 0.45


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (48, 48), (16, 8, 3, 3, 3)])
def test_muon_steps_are_orthogonal(shape):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape)
    optimizer = muon.Muon([parameter], lr=0.1)
    optimizer.step()
    rows, columns = shape[0], parameter[0].numel()
    step = -parameter.detach().flatten(1) / (0.1 * 0.2 * max(rows, columns) ** 0.5)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.6 and singular.max() < 1.3
    # the update's root mean square is near AdamW's, lr * 0.2
    assert 0.5 < parameter.square().mean().sqrt() / (0.1 * 0.2) < 1.3


def test_clips_are_seeded_and_of_the_train_split():
    first, second = (train_tiny_wan.Clips(torch.device("cpu"), seed=9, layouts=8) for _ in range(2))
    for _ in range(3):
        (a, _, specs), (b, background, _) = first.draw(4), second.draw(4)
        assert a.shape == (4, 3, 17, 64, 64) and torch.equal(a, b)
        assert torch.allclose(a[:, :, 0, 0, 0], background, atol=1e-6), "corners show the background"
    assert len(specs.scenes()) == 4


@pytest.mark.slow
def test_the_script_runs_from_scratch_to_scores(tmp_path):
    output = tmp_path / "model"
    command = [sys.executable, str(ROOT / "assets_src" / "train_tiny_wan.py"), "--output", str(output), "--smoke"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "--device", "cpu"], check=True, timeout=600, env=environment)
    pipe = WanPipeline.from_pretrained(output, dtype=torch.float32)
    assert pipe.vae.config.latents_std != [1.0] * 16
    assert len(pipe.tokenizer("a red circle")["input_ids"]) == 4, "no padding or truncation is stored"
    assert all(path.stat().st_size < 16 * 2**20 for path in output.rglob("*"))
    assert json.loads((output / "settings.json").read_text())["vae_steps"] == 2
    rows = json.loads((output / "scores.json").read_text())["rows"]
    assert {row["split"] for row in rows} == {"test_seen", "test_color_shape", "test_shape_motion"}
    assert all(0 <= row["alignment"] <= 1 for row in rows)
