"""benchmarks/real_check.py: its small run on a CPU, and the sizes of its random weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def random_wan(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import random_wan

    return random_wan


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--short", "--offload", "text_encoder", "vae", "rewards", "denoiser"]])
def test_the_small_run_prints_its_table(options):
    command = [sys.executable, str(ROOT / "benchmarks" / "real_check.py"), "--tiny", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = dict(line.split(maxsplit=1) for line in run.stdout.splitlines() if line and line[0].islower())
    seconds = [float(rows[name].split()[0]) for name in ("building", "text", "rollout", "decode", "update", "other")]
    assert all(value > 0 for value in seconds)
    assert "adapter reload       equal" in run.stdout and "0.00e+00" in run.stdout


def test_random_weights(random_wan):
    pipe = random_wan.random_wan(True, torch.bfloat16, "cpu", vae_dtype=torch.bfloat16)
    denoiser, encoder = pipe.transformer, pipe.text_encoder
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert denoiser.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert denoiser.scale_shift_table.dtype == torch.float32, "kept in fp32, as diffusers loads it"
    assert {p.dtype for p in (*pipe.vae.parameters(), *encoder.parameters())} == {torch.bfloat16}
    assert float(denoiser.blocks[0].ffn.net[2].weight.float().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((denoiser.blocks[0].norm2.weight == 1).all()) and not denoiser.blocks[0].attn1.to_q.bias.any()
    video = pipe("a", height=16, width=16, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 5, 3, 16, 16) and video.isfinite().all()


def test_sizes_are_those_of_the_models(random_wan):
    """Wan 2.1 has 1.42 and 14.29 B parameters, and UMT5-XXL's encoder 5.68 B."""
    counts = {}
    for model in ("wan21_1.3b", "wan21_14b"):
        pipe = random_wan.random_wan(False, torch.bfloat16, "meta", model=model, text_encoder="full")
        counts[model] = sum(p.numel() for p in pipe.transformer.parameters()) / 1e9
        counts["text"] = sum(p.numel() for p in pipe.text_encoder.parameters()) / 1e9
    assert counts == pytest.approx({"wan21_1.3b": 1.42, "wan21_14b": 14.29, "text": 5.68}, abs=0.005)
