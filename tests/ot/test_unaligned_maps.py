"""The maps of benchmarks/unaligned_maps.py on clouds whose map is known, and the whole path at its smallest."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("ot")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("unaligned_maps")


@pytest.fixture
def clouds():
    """Texts, and videos that are their rotation, moved; rows belong together."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator) * torch.linspace(0.5, 2, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    return x, x @ rotation + 0.5


@pytest.mark.parametrize("name", ["procrustes", "ridge", "kernel_ridge"])
def test_pairs_teach_a_rotation(script, clouds, name):
    x, y = clouds
    error = (getattr(script, name)(x[:300], y[:300])(x[300:]) - y[300:]).square().sum() / (
        y - y.mean(0)
    ).square().sum()
    assert error < {"procrustes": 1e-10, "ridge": 1e-4, "kernel_ridge": 0.05}[name]


def test_cca_brings_both_sides_together(script, clouds):
    x, y = clouds
    text, video = script.cca(x[:300], y[:300], shrinkage=1e-6)
    assert torch.nn.functional.cosine_similarity(text(x[300:]), video(y[300:])).min() > 0.999


@pytest.mark.parametrize("name", ["keypoints", "fused GW"])
def test_keypoints_anchor_a_plan(script, clouds, name):
    """32 pairs, and clouds without: the map comes near to the rotation; without pairs none can."""
    x, y = clouds
    pairs = x[:32], y[:32]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    unpaired = x[100:500], y[100:500][order]
    if name == "keypoints":
        found = script.keypoints(*unpaired, pairs)
    else:
        found = script.fused_gromov_wasserstein(*unpaired, pairs, points=400)
    near = torch.nn.functional.cosine_similarity(found(x[500:]) - 0.5, y[500:] - 0.5).mean()
    lost = torch.nn.functional.cosine_similarity(
        script.LinearMap().fit(*unpaired)(x[500:]) - 0.5, y[500:] - 0.5
    ).mean()
    assert near > 0.9 and near > lost + 0.2


def test_the_winner_is_chosen_on_other_prompts(script, capsys):
    """A map that is best by luck on the even prompts is judged by the odd ones."""
    measures = dict.fromkeys(script.COLUMNS, 0.0)
    rows = {
        "raw": measures | {"even": 0.1, "odd": 0.3},
        "linear": measures | {"even": 0.9, "odd": 0.1},
        "entropic": measures | {"even": 0.2, "odd": 0.8},
    }
    script.tables({f"alone-{seed}": {"0": rows} for seed in (0, 1)}, [("alone", 0)], [0, 1])
    assert capsys.readouterr().out.splitlines()[-1].endswith("raw 0.000 | linear 0.000 | -0.200 +- 0.000 |")


@pytest.mark.slow
def test_the_smallest_run(tmp_path):
    train = [sys.executable, str(ROOT / "assets_src" / "train_unaligned.py"), "--smoke", "--output", str(tmp_path)]
    subprocess.run(train, check=True)
    card = json.loads((tmp_path / "frozen-16-0" / "settings.json").read_text())
    assert card["variant"] == "frozen-16" and len(card["sha256"]) == 64
    small = "--seeds 0 --pairs 16 32 --clips 128 --unseen 64 --prompts 2 --gw_points 64 --device cpu".split()
    measure = [sys.executable, str(ROOT / "benchmarks" / "unaligned_maps.py"), "--encoders", str(tmp_path)]
    done = subprocess.run(
        [*measure, "--output", str(tmp_path / "maps"), *small],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "| alone | 16 | fused GW |" in done.stdout and len(list((tmp_path / "maps").glob("*.json"))) == 7
