"""The study: which runs are taken for which, and what its tables make of records."""

import importlib
import json
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    return lambda name: importlib.import_module(name)


# --- runs ---


def test_a_run_of_other_settings_is_not_taken_up(study, tmp_path):
    run = study("run")
    settings = run.begin("grpo_semantic", 0, tmp_path, ["--max_steps", "2"])
    assert settings["seed"] == 0 and settings["trainer"] == "grpo"
    assert run.begin("grpo_semantic", 0, tmp_path, ["--max_steps", "2"]) == settings  # resumes after an interruption
    with pytest.raises(ValueError, match=r"is of a run with other options: \[\['--max_steps', '2'\]\], now \[\[\]\]"):
        run.begin("grpo_semantic", 0, tmp_path, [])
    (tmp_path / "grpo_none_0" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "grpo_none_0" / "checkpoint-2" / "policy.json").write_text("{}")  # as a trainer's has
    with pytest.raises(ValueError, match="no settings.json to know them by"):
        run.begin("grpo_none", 0, tmp_path, [])


def test_a_record_of_other_settings_is_not_taken_for_this_run(study, tmp_path):
    run = study("run")
    settings = run.settings_of("base") | {"seed": 1, "output_dir": "elsewhere"}
    del settings["trainer"]
    path = tmp_path / "records" / "base_1.json"
    path.parent.mkdir()

    def record(extra):
        return run.record("base", 1, tmp_path, extra, threads=None, end=0.0)

    assert record([]) == "base seed 1: not begun"
    path.write_text(json.dumps({"settings": settings, "extra": []}))
    assert record([]) == "base seed 1: recorded before"
    with pytest.raises(ValueError, match="other options"):
        record(["--max_steps", "2"])
    path.write_text(json.dumps({"settings": settings | {"learning_rate": 1e-4}, "extra": []}))
    with pytest.raises(ValueError, match=r"other learning_rate: \[0.0001\], now \[0.0\]"):
        record([])


def test_a_cell_without_its_map_names_the_command_that_fits_it(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="maps.py --only neural"):
        study("run").begin("map_neural", 0, tmp_path, [])


# --- tables ---


def write_record(folder, cell: str, seed: int, correct: list[float]) -> None:
    """A run of three evaluations; every measure other than `correct` is 0.5."""
    scores = [
        "judges/shapemotion_alignment",
        "judges/shapemotion_quality",
        "judges/judge_cosine",
        "judges/judge_matching",
        "reward",
    ]
    sets = [
        {
            name: {"scores": {"judges/shapemotion_correct": [value, None, value], **{s: [0.5] for s in scores}}}
            for name in ("test_seen", "held_out")
        }
        for value in correct
    ]
    made = {
        "cell": cell,
        "seed": seed,
        "settings": {"rewards": ["cosine"]},
        "steps": [{"step_time": 2.0}] * 3,
        "evaluations": [{"step": 10 * i, "sets": part} for i, part in enumerate(sets)],
        "kl": {"0": 0.0, "10": 1.0, "20": 4.0},
        "diversity": {"distance": 0.7, "vendi": 2.5},
    }
    (folder / f"{cell}_{seed}.json").write_text(json.dumps(made))


def test_tables(study, tmp_path, capsys):
    table = study("table")
    for seed, none, both in ((0, 0.1, 0.3), (1, 0.2, 0.4), (2, 0.6, 0.5)):
        write_record(tmp_path, "grpo_none", seed, [0.0, 0.5, none])
        write_record(tmp_path, "grpo_both", seed, [0.0, 0.2, both])
    write_record(tmp_path, "grpo_both", 3, [0.0, 0.0, 0.9])  # has no partner
    write_record(tmp_path, "cd", 0, [0.0, 0.0, 0.8])
    table.main([str(tmp_path), "--cells", "grpo_both"])
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith(("| grpo_none", "| cd")) for line in lines)
    after, *_ = [line for line in lines if line.startswith("| grpo_both | 4 |")]
    # mean of .3 .4 .5 .9; their standard deviation .2630 * t_3(.975) 3.182 / 2
    assert after.startswith("| grpo_both | 4 | 0.525 +- 0.418 |")
    assert after.endswith("| 4.000 +- 0.000 |  | 6.000 +- 0.000 |")  # guided: not recorded
    # by seed .2 .2 -.1: mean .1, standard deviation .1732 * t_2(.975) 4.303 / sqrt(3)
    paired = [line for line in lines if line.startswith("| grpo_both | 3 |")]
    assert len(paired) == 2 and all(line.startswith("| grpo_both | 3 | 0.100 +- 0.430 |") for line in paired)
    # stopped by itself: .3 .4 .5 .9; by the constant matching: at the first evaluation
    assert lines[-1].split(" | ")[3] == "0.000 +- 0.000" and lines[-1].endswith("| 0.525 +- 0.418 |")


def test_tables_of_a_stage(study, tmp_path, capsys):
    write_record(tmp_path, "grpo_none", 0, [0.0, 0.1, 0.2])
    write_record(tmp_path, "cd", 0, [0.0, 0.0, 0.8])
    study("table").main([str(tmp_path), "--stage", "A"])
    out = capsys.readouterr().out
    assert "| grpo_none | 1 | 0.200 |" in out and "| cd |" not in out
    study("table").main([str(tmp_path)])
    assert "| cd | 1 | 0.600 |" in capsys.readouterr().out  # minus grpo_none
    with pytest.raises(SystemExit):
        study("table").main([str(tmp_path), "--cells", "grpo_both"])
