"""Benchmarks: what side_by_side, cost, families_speed and local_attention compute besides times, and small runs."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_a_checkout_that_lacks_something_is_named(load, tmp_path, monkeypatch):
    side_by_side = load("side_by_side")
    monkeypatch.setattr(sys, "path", [*sys.path])
    sampling, training = tmp_path / side_by_side.SAMPLING, tmp_path / side_by_side.TRAINING

    def refused(message: str, text: str | None = None, path: Path | None = None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for name in [name for name in sys.modules if name.split(".")[0] == "flow_grpo"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        with pytest.raises(ValueError, match=message):
            side_by_side.flow_grpo(tmp_path)

    refused("no file flow_grpo/diffusers_patch/wan_pipeline_with_logprob.py")
    refused("no file scripts/train_wan2_1.py", "import nothing_of_this_name", sampling)
    refused("No module named 'nothing_of_this_name'", "import not_installed", training)
    refused("no function sde_step_with_logprob", "wan_pipeline_with_logprob = print", sampling)
    refused("no function compute_log_prob", "wan_pipeline_with_logprob = sde_step_with_logprob = len\n", sampling)
    training.write_text("import not_installed\ndef compute_log_prob(a): return sde_step_with_logprob(a)\n", "utf-8")
    sample, compute_log_prob = side_by_side.flow_grpo(tmp_path)
    assert sample is len and compute_log_prob([1, 2]) == 2, "of its script one function, in the other file's names"


@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_local_attention_is_attention_under_a_mask(load, group):
    local, frames, tokens = load("local_attention"), 7, 5
    q, k, v = (torch.randn(2, frames * tokens, 3, 8, dtype=torch.float64) for _ in range(3))
    text = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    own = torch.arange(frames).repeat_interleave(tokens) // group
    mask = (own[:, None] - own).abs() <= 1

    def attend(k, v, mask=None):
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask).transpose(1, 2)

    with local.local_attention(frames, group):
        found = [local.transformer_wan.dispatch_attention_fn(q, *kv) for kv in ((k, v), (text, text))]
    torch.testing.assert_close(found, [attend(k, v, mask), attend(text, text)])
    assert local.density(frames, group) == pytest.approx(float(mask.double().mean()))
    torch.testing.assert_close(local.transformer_wan.dispatch_attention_fn(q, k, v), attend(k, v))


def test_the_fit_finds_the_terms_of_a_curve(load):
    cost = load("cost")
    n = np.array([2.0, 3.5, 8.0, 16.0, 33.0])
    terms, residual = cost.fitted(n, 5 + 9 * n + 0.7 * n**2)
    assert terms == pytest.approx([5, 9, 0.7]) and residual < 1e-9
    assert cost.fitted(n[:3], n[:3]) is None


def test_points_begin_with_a_spread_of_the_curve(load):
    cost = load("cost")
    assert cost.spread([0, 1, 2, 3, 4]) == [0, 4, 2, 1, 3] and cost.spread([7]) == [7] and cost.spread([]) == []
    points = cost.points_of(argparse.Namespace(sizes=cost.SIZES, frames=cost.FRAMES, batch=cost.BATCHES))
    assert [cost.tokens_of(point) for point in points[:2]] == [1950, 63960]
    assert len({tuple(point.values()) for point in points}) == len(points) == 12 + 2 * 8
    assert cost.tokens_of(dict(size="240x416", frames=33)) == 3510


def test_a_setting_that_runs_out_of_memory_gets_a_row(load, monkeypatch):
    cost, speed = load("cost"), load("speed")

    def full() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "build", lambda *args, **kwargs: None)
    monkeypatch.setattr(speed, "phases", lambda policy, work: (lambda: None, full, []))
    point = dict(size="240x416", frames=33, batch=2, **cost.USUAL)
    row = cost.measured(point, argparse.Namespace(tiny=False, repeats=1), "cpu")
    assert "update" not in row and cost.line(row).count("out of memory") == 1
    assert len(cost.curve([row], "rollout")[0]) == 1 and len(cost.curve([row], "update")[0]) == 0


def run_tiny(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--tiny", "--repeats", "1", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
def test_the_small_cost_run_resumes(tmp_path):
    file = tmp_path / "cost.json"
    options = ["--json", str(file), "--sizes", "16x16", "--frames", "5", "9", "--batch", "1"]
    assert run_tiny("cost.py", *options, "--minutes", "0").count("not measured within 0 minutes") == 5
    assert "no fit" in run_tiny("cost.py", *options)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 5 and all(row["rollout"]["ms"] > 0 and row["update"]["ms"] > 0 for row in rows)
    assert {row["error"] for row in rows} == {0.0}


@pytest.mark.slow
def test_the_small_run_of_families():
    printed = run_tiny("families_speed.py", "--families", "ltx", "kandinsky5", "--batch", "1")
    rows = [line.split(" | ") for line in printed.splitlines() if "Transformer3DModel" in line]
    assert len(rows) == 2 and all(float(cell) > 0 for row in rows for cell in row[2:8])
