"""What is released: one version everywhere, and a wheel that works outside the checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import pisces_rl

ROOT = Path(__file__).parents[1]
FILES = ["CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.cfg", "src"]


def test_the_version_is_one():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    version = settings["metadata"]["version"]
    assert pisces_rl.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert re.search(rf"^## {re.escape(version)}$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_a_release_has_links_that_work_on_pypi(tmp_path):
    """The repository's address is known to the workflow, so the files have none."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    (step,) = (x for x in workflow["jobs"]["build"]["steps"] if x.get("name") == "links that work on PyPI")
    for name in ("README.md", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    repository = dict(GITHUB_SERVER_URL="https://github.com", GITHUB_REPOSITORY="me/rl", GITHUB_REF_NAME="v0.1.0")
    run("bash", "-ec", step["run"], folder=tmp_path, **repository)
    before, after = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, tmp_path))
    links = re.findall(r"\]\(([^)]+)\)", after)
    assert len(links) == len(re.findall(r"\]\(", before)) and all(link.startswith("https://") for link in links)
    assert "](https://github.com/me/rl/raw/v0.1.0/docs/images/before_after.webp)" in after
    assert "](https://github.com/me/rl/blob/v0.1.0/docs/grpo.md#what-a-pipeline" in after
    settings = configparser.ConfigParser()
    settings.read(tmp_path / "setup.cfg")
    assert "Repository = https://github.com/me/rl" in settings["metadata"]["project_urls"]
    assert settings["metadata"]["license"] == "Apache-2.0"


@pytest.mark.slow
def test_the_wheel_trains_outside_the_checkout(tmp_path):
    """Built from the source distribution, so that neither lacks a file; tried by its own command."""
    source = tmp_path / "source"
    source.mkdir()
    for name in FILES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, source)
    built = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    archive = run(sys.executable, "-c", built, folder=source).split()[-1]
    with tarfile.open(source / archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    wheel = run(sys.executable, "-c", built, folder=unpacked).split()[-1]
    site = tmp_path / "site"
    with zipfile.ZipFile(unpacked / wheel) as file:
        file.extractall(site)
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    missing = {name.removeprefix("src/") for name in tracked} - names
    assert not missing, sorted(missing)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = run(sys.executable, "-c", "import pisces_rl; print(pisces_rl.__file__)", folder=elsewhere, **environment)
    assert Path(where.strip()).is_relative_to(site)
    options = "--method rvm --model tiny-wan --dataset shapemotion --rewards shapemotion_reward --eval_prompts 4 "
    options += "--height 64 --width 64 --num_frames 17 --num_inference_steps 4 --guidance_scale 1 --max_steps 1 "
    options += "--per_device_train_batch_size 8 --num_generations 4 --report_to none --use_cpu true --output_dir run"
    run(sys.executable, "-m", "pisces_rl.command", "train", *options.split(), folder=elsewhere, **environment)
    assert (elsewhere / "run" / "pytorch_lora_weights.safetensors").exists()
