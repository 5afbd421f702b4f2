"""A newcomer's first hour: the shortest script, and every snippet of the README and the docs as it is written."""

import argparse
import importlib
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_pipelines import BUILD, quiet
from trainers.tiny_runs import largest_difference, trainer, weights

from pisces_rl import RewardBackpropConfig, VideoGRPOConfig, VideoGRPOTrainer, cli, load_pipeline
from pisces_rl.assets import call_defaults
from pisces_rl.trainers.base.watch import plan
from pisces_rl.trainers.base.watch.plan import step_plan

MODULES = [importlib.import_module(f"pisces_rl.cli.{name}") for _, name, _ in pkgutil.iter_modules(cli.__path__)]
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB = re.compile(r'"[A-Z][\w-]*/[\w.-]+"')  # a model that cannot be downloaded here
FOUR = Dataset.from_dict({"prompt": ["a red circle", "a blue square", "a green triangle", "a red cross"]})


def brightness(prompts, videos, **columns):
    return videos.mean(dim=(1, 2, 3, 4)).tolist()


def python_snippets() -> list:
    found = [
        (page, code)
        for page in PAGES
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    ]
    return [
        pytest.param(code, id=f"{page.stem}-{i}", marks=pytest.mark.slow if trains(code) else ())
        for i, (page, code) in enumerate(found)
    ]


def trains(code: str) -> bool:
    """The shortest script takes half a minute on two cores."""
    return ".train()" in code and not HUB.search(code)


def commands() -> list:
    """Indented lines, and code in the text, that start a script of this repository.

    Those that hand arguments to the runs that they start are left out.
    """
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S).replace("\\\n", " ")
        lines = re.findall(r"^    (.+)$", text, re.M) + [" ".join(m.split()) for m in re.findall(r"`([^`]+)`", text)]
        starts = [
            line
            for line in lines
            if re.match(r"(\w+=\S+ )*(python|accelerate launch) .*\w+/\w+\.py", line) and not hands_arguments_on(line)
        ]
        found += [(page.stem, line) for line in dict.fromkeys(starts)]
    return [pytest.param(line, id=f"{page}-{i}") for i, (page, line) in enumerate(found)]


def hands_arguments_on(line: str) -> bool:
    script = ROOT / re.search(r"[\w/]+\.py", line)[0]
    return script.is_file() and "parse_known_args" in script.read_text(encoding="utf-8")


class Parsed(Exception):
    """A script has read its arguments."""


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_docs_is_one(line, monkeypatch):
    """Each script reads its arguments with its own parser; nothing more is run."""
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if re.fullmatch(r"\w+(/\w+)*\.py", word))
    assert all((ROOT / word).is_file() for word in words[: start + 1] if word.endswith((".yaml", ".py")))
    if not re.search(r"parse_arg(s|uments)\(|sys\.argv", (ROOT / words[start]).read_text()):
        assert words[start + 1 :] == [], "the script reads no arguments"
        return
    parse_arguments, parse_args = cli.arguments.parse_arguments, argparse.ArgumentParser.parse_args

    def parsed(parse):
        def then_leave(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return then_leave

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str((ROOT / words[start]).parent))
    for module in MODULES:
        if hasattr(module, "parse_arguments"):
            monkeypatch.setattr(module, "parse_arguments", parsed(parse_arguments))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed(parse_args))
    monkeypatch.setattr(sys, "argv", [w.replace("RECIPE", "recipes/shapemotion_grpo.yaml") for w in words[start:]])
    with pytest.raises((Parsed, SystemExit)) as end:
        runpy.run_path(words[start], run_name="__main__")
    assert end.type is Parsed or end.value.code == 0  # --help


@pytest.mark.parametrize("code", python_snippets())
def test_a_snippet_of_the_docs_runs(code, tmp_path, monkeypatch):
    """As it is written; where it names a model of the Hub, on tiny-wan, up to the training."""
    monkeypatch.chdir(tmp_path)
    if HUB.search(code):
        code = re.sub(r"trainer\.\w+\(\)", "", HUB.sub('"tiny-wan"', code))
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_an_embedded_model_brings_its_call(tmp_path):
    """Without a size tiny-wan trained at the 480 x 832 x 81 of its class."""
    own = {"height": 64, "width": 64, "num_frames": 17, "guidance_scale": 1.0, "max_sequence_length": 24}
    for model in ("tiny-wan", load_pipeline("tiny-wan")):
        args = VideoGRPOConfig(output_dir=str(tmp_path), report_to="none")
        made = VideoGRPOTrainer(model, brightness, args, FOUR)
        assert made.policy.pipeline_kwargs == own and made.policy.num_inference_steps == 4
        assert args.height is None  # the caller's config serves another model


def test_what_is_set_wins(tmp_path):
    """A user's size, steps and pipeline_kwargs go before the model's own."""
    args = VideoGRPOConfig(
        output_dir=str(tmp_path),
        height=32,
        num_inference_steps=3,
        pipeline_kwargs={"width": 48, "negative_prompt": "grey"},
    )
    args.settle_call(call_defaults("tiny-wan"))
    assert args.policy_kwargs() == {
        "height": 32,
        "width": 48,
        "num_frames": 17,
        "guidance_scale": 1.0,
        "max_sequence_length": 24,
        "negative_prompt": "grey",
    }
    assert args.num_inference_steps == 3


def test_another_model_has_its_pipelines_size_and_16_steps(tmp_path):
    """Nothing is known of a model that does not ship with the package."""
    args = VideoGRPOConfig(output_dir=str(tmp_path))
    args.settle_call(call_defaults("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    assert args.policy_kwargs() == {} and args.num_inference_steps == 16


def test_settings_that_count_steps_are_checked_against_the_models_own(tmp_path):
    """backprop_steps=10 fits 16 steps, but not the 4 of tiny-wan."""
    args = RewardBackpropConfig(output_dir=str(tmp_path), backprop_steps=10)
    with pytest.raises(ValueError, match="backprop_steps=10 must lie between 1 and num_inference_steps=4"):
        args.settle_call(call_defaults("tiny-wan"))


def test_fewer_prompts_than_a_rollout_takes(tmp_path):
    """Four prompts do for the defaults, and a larger batch says what it needs."""
    args = VideoGRPOConfig(output_dir=str(tmp_path), gradient_accumulation_steps=8)
    with pytest.raises(ValueError, match="a rollout takes 8 different prompts .* but train_dataset has only 4"):
        VideoGRPOTrainer("tiny-wan", brightness, args, FOUR)


def test_a_run_says_what_a_step_takes(tmp_path):
    """A run at the pipeline's default size went on for minutes without a word."""
    args = VideoGRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    made = VideoGRPOTrainer(quiet(BUILD["wan"](0)), brightness, args, FOUR)
    wanted = "each optimizer step samples 8 videos (1 x 8): 81 frames of 480 x 832, 16 denoising steps"
    assert step_plan(made.policy, made.args) == wanted


def test_a_large_model_s_memory_is_estimated_before_the_first_step(tmp_path, monkeypatch, capsys):
    """Here every model is large. The estimate changes no weight: it draws nothing and leaves the pipeline alone."""
    runs = {}
    for large in (2**30, 0):
        monkeypatch.setattr(plan, "LARGE", large)
        runs[large] = trainer(tmp_path / str(large), max_steps=1)
        runs[large].train()
    shown = capsys.readouterr().out
    assert largest_difference(*map(weights, runs.values())) == 0
    assert len(re.findall(r"estimated memory: 0\.\d GiB a process \(sampling .*, decoding .*, update ", shown)) == 1
