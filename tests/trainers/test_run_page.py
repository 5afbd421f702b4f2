"""A run's folder as JSON and as one HTML file, without a browser."""

import json
import re
import warnings

import pytest
from folders_of_runs import HOSTILE, PLAIN, folder_of_run
from tiny_runs import prompts, redness, trainer

from pisces_rl.command import main
from pisces_rl.run_files import RunFiles, described
from pisces_rl.run_page import page, read_run, write_page
from pisces_rl.run_page.read_run import MOST_EVALUATIONS, MOST_POINTS, correlation


def data_of(text: str) -> dict:
    """What the page's script reads, found as a browser finds it: up to the first end tag."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)
    return json.loads(found[1])


def test_a_whole_run_is_read(tmp_path):
    run = read_run(folder_of_run(tmp_path / "run"))
    assert (run["name"], run["trainer"], run["step"], run["max_steps"]) == ("run", "Video GRPO", 4, 4)
    first, last = run["evaluations"]
    part = last["sets"]["held_out"]
    assert (first["step"], last["step"]) == (0, 4) and run["prompts"][part["prompts"]] == PLAIN
    assert part["videos"] == ["samples/step_000004/held_out/000.mp4", "samples/step_000004/held_out/001.mp4"]
    assert part["means"]["reward"] == pytest.approx(sum(part["scores"]["reward"]) / 3, rel=1e-5)
    assert run["curves"]["reward"] == [[1, 0.1], [2, 0.2], [3, 0.3], [4, 0.4]] and "loss" not in run["curves"]
    assert run["time"] == {"steps": 4, "parts": {"rollout": 8.0, "rewards": 4.0, "rewards/bright": 4.0, "idle": 2.0}}
    assert run["correlations"]["sets"]["held_out"]["values"] == [[1.0, 1.0], [1.0, 1.0]]
    assert run["comparison"]["to_step"] == 4 and run["settings"]["learning_rate"] == "0.001" and not run["notes"]
    assert {path for path, _ in run["files"]} == set(described(tmp_path / "run"))


def test_correlation_is_pearsons():
    assert correlation([1, 2, 3, None], [2.0, 4.0, 6.5, 1]) == pytest.approx(0.9979487)
    assert correlation([1, 2, 3], [5, 5, 5]) is None and correlation([1, 2, None], [1, 2, 3]) is None
    assert correlation([1e9, 1e9 + 1, 1e9 + 2], [3, 2, 1]) == pytest.approx(-1)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_no_text_of_a_user_leaves_the_data(tmp_path, prompt):
    text = write_page([folder_of_run(tmp_path / "run", [prompt], name="a&b <i>")]).read_text(encoding="utf-8")
    assert text.count("</script") == text.count("<script") == 2 and text.count("<img") == text.count("<i>") == 0
    run = data_of(text)["runs"][0]
    assert run["prompts"] == [[prompt]] and "a&b <i>" in run["evaluations"][0]["sets"]


def test_a_lone_surrogate_is_written_as_it_is(tmp_path):
    folder = folder_of_run(tmp_path / "run", shown=0)
    path = folder / "evaluations" / "step_000004.json"
    path.write_text(path.read_text().replace("a red square", "\\ud83d"), encoding="utf-8")
    assert data_of(write_page([folder]).read_text(encoding="utf-8"))["runs"][0]["prompts"][1][0] == "\ud83d"


def test_nan_scores_become_none(tmp_path):
    folder = folder_of_run(tmp_path / "run", shown=0)
    scores = {
        "reward": [float("nan"), float("inf"), 1],
        "rewards/a": [None, "0.5", True],
        "rewards/b": 3,
        "rewards/c": [10**400, 0.1],
    }
    (folder / "evaluations" / "step_000004.json").write_text(
        json.dumps({"step": 4, "sets": {"held_out": {"prompts": PLAIN, "scores": scores}, "odd": [1]}})
    )
    part = read_run(folder)["evaluations"][1]["sets"]["held_out"]
    assert part["scores"] == {"reward": [None, None, 1], "rewards/a": [None, None, 1], "rewards/c": [None, 0.1]}
    assert part["means"] == {"reward": 1.0, "rewards/a": 1.0, "rewards/c": 0.1}
    data_of(write_page([folder]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", ["evaluations/step_000004.json", "run.json", "report.json"])
def test_half_written_files_are_skipped_and_named(tmp_path, path):
    folder = folder_of_run(tmp_path / "run")
    whole = (folder / path).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / path).write_bytes(content)
        run = read_run(folder)
        assert [note.split()[0] for note in run["notes"]] == [path]
        page([run | {"base": "", "embedded": {}}])
    assert len(run["evaluations"]) == 2  # of the half-written one, its samples


def test_a_run_without_run_json_is_that_of_its_last_checkpoint(tmp_path):
    folder = folder_of_run(tmp_path / "run")
    state = json.loads((folder / "run.json").read_text())["state"]
    (folder / "run.json").unlink()
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "policy.json").write_text('{"trainer": "NFT", "settings": {"seed": 3}}')
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    run = read_run(folder)
    assert (run["step"], run["trainer"], run["settings"], run["given"]) == (10, "NFT", {"seed": "3"}, None)
    assert "checkpoint-10" in run["notes"][0] and "reward" in run["curves"]


@pytest.mark.parametrize("removed, evaluations", [("evaluations", 2), ("samples", 2), ("run_files.json", 2)])
def test_a_run_that_lacks_a_part(tmp_path, removed, evaluations):
    folder = folder_of_run(tmp_path / "run")
    if (folder / removed).is_dir():
        (folder / removed).rename(tmp_path / "away")
    else:
        (folder / removed).unlink()
    run = read_run(folder)
    assert len(run["evaluations"]) == evaluations
    videos = run["evaluations"][0]["sets"]["held_out"]["videos"]
    assert videos == ([] if removed == "samples" else [f"samples/step_000000/held_out/00{i}.mp4" for i in (0, 1)])
    assert all(path.split("/")[0] != removed for path, _ in run["files"]) and write_page([folder]).exists()


def test_steps_a_resume_discarded_are_not_shown(tmp_path):
    """Resumed from step 2 of 4: evaluation, samples and report of step 4 are of an earlier state."""
    folder = folder_of_run(tmp_path / "run", steps=(0, 2, 4))
    RunFiles(folder).resume(2)
    run = read_run(folder)
    assert [one["step"] for one in run["evaluations"]] == [0, 2] and run["comparison"] is None


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name, message in (
        ("missing", "not a folder"),
        ("empty", "not a run's folder"),
        ("other", "not a run's folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run(tmp_path / name)
        with pytest.raises(SystemExit, match=message):
            main(["report", str(tmp_path / name)])
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_set_does_not_lead_out_of_the_folder(tmp_path):
    folder = folder_of_run(tmp_path / "run")
    secret = folder_of_run(tmp_path / "secret")
    sets = {
        f"../../../secret/samples/step_{step:06d}/held_out": {"prompts": PLAIN, "scores": {"reward": [1, 2, 3]}}
        for step in (0, 4)
    }
    (folder / "evaluations" / "step_000004.json").write_text(json.dumps({"step": 4, "sets": sets}))
    assert secret.exists() and "secret" in str(sets)
    assert all(part["videos"] == [] for part in read_run(folder)["evaluations"][1]["sets"].values())


def test_a_page_that_is_not_ours_stays(tmp_path):
    folder = folder_of_run(tmp_path / "run")
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ValueError, match="it is kept"):
        write_page([folder])
    assert (folder / "report.html").read_text() == "<p>mine</p>"
    (folder / "report.html").unlink()
    assert write_page([folder]) == write_page([folder]) and "report.html" in described(folder)
    with pytest.raises(ValueError, match="is a folder"):
        write_page([folder], tmp_path)
    with pytest.raises(ValueError, match="output is not set"):
        write_page([folder, folder])


def test_links_and_one_file(tmp_path, monkeypatch, capsys):
    a, _ = folder_of_run(tmp_path / "a #1"), folder_of_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    main(["report", str(a), "b"])
    assert "wrote comparison.html" in capsys.readouterr().out
    runs = data_of((tmp_path / "comparison.html").read_text(encoding="utf-8"))["runs"]
    assert [run["base"] for run in runs] == ["a%20%231/", "b/"] and not runs[0]["embedded"]
    main(["report", str(a), "--one_file", "--output", "out/alone.html"])
    (run,) = data_of((tmp_path / "out" / "alone.html").read_text(encoding="utf-8"))["runs"]
    assert run["base"] is None and len(run["embedded"]) == 4
    assert all(uri.startswith("data:video/mp4;base64,") for uri in run["embedded"].values())


def test_long_runs_stay_small(tmp_path):
    folder = folder_of_run(tmp_path / "run", steps=range(100), shown=0)
    content = json.loads((folder / "run.json").read_text())
    content["state"]["log_history"] = [{"step": step, "reward": step / 3} for step in range(1, 20_001)]
    (folder / "run.json").write_text(json.dumps(content))
    run = read_run(folder)
    kept = [one["step"] for one in run["evaluations"] if one["sets"]["held_out"]["scores"]]
    assert len(run["evaluations"]) == 100 and len(kept) == MOST_EVALUATIONS and kept[0] == 0 and kept[-1] == 99
    assert all("reward" in one["sets"]["held_out"]["means"] for one in run["evaluations"])
    points = run["curves"]["reward"]
    assert len(points) <= MOST_POINTS and points[-1] == [20_000, 6666.67]


def test_a_trainer_writes_its_page(tmp_path):
    """At evaluations, at the end and after the adapter; a page that cannot be written is a warning."""
    made = trainer(
        tmp_path,
        eval_dataset=prompts(3),
        judges=redness,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        eval_on_start=True,
    )
    made.train()
    made.save_model()
    run = data_of((tmp_path / "report.html").read_text(encoding="utf-8"))["runs"][0]
    assert [one["step"] for one in run["evaluations"]] == [0, 1, 2] and run["step"] == run["max_steps"] == 2
    assert len(run["curves"]["reward"]) == 2 and run["time"]["steps"] == 2 and run["comparison"]["to_step"] == 2
    assert run["settings"]["judges"] == '["redness"]' and "learning_rate" in run["given"]
    assert run["fps"] == made.args.fps
    assert {"pytorch_lora_weights.safetensors", "README.md", "report.json"} <= {path for path, _ in run["files"]}
    assert {"report.html", "run.json"} <= set(described(tmp_path)) and not run["notes"]

    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.report.page.write(made.args, made.state)
    assert any("report.html could not be written" in str(warning.message) for warning in caught)
