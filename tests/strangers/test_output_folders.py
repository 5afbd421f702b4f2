"""Folders as people have them: an earlier run in the same place, their own files beside ours, a stop in the middle.

Such cases come from trainers' issue trackers: a card with another run's samples, a folder `checkpoint-best` that the
rotation of checkpoints removed, a README that a push overwrote.
"""

import json
import re
import warnings

import pytest
from fake_hub import running_hub
from test_hub import push
from tiny_pipelines import BUILD, quiet
from trainers.tiny_runs import StopAt, brightness, prompts, trainer
from transformers import TrainerCallback

from pisces_rl.run_files import RunFiles
from pisces_rl.trainers.resume import last_checkpoint

SAVES = {"save_strategy": "steps", "save_steps": 1}


def files_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def links_of(folder) -> list[str]:
    """Files of the folder that its card shows or links; each must be there."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)]+)\)", card)
    assert all((folder / link).is_file() for link in links)
    return links


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with all that a run can leave, and its files."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    made = trainer(folder, eval_dataset=prompts(2), max_steps=2, log_completions=True, trace_steps=1,
                   report_to="tensorboard", **SAVES)
    made.train()
    made.save_model()
    return folder, files_in(folder)


@pytest.fixture
def earlier(finished_run, tmp_path):
    """A copy of it in a folder that may be changed."""
    import shutil

    return shutil.copytree(finished_run[0], tmp_path / "run"), finished_run[1]


def test_all_that_a_run_writes_is_listed(finished_run):
    """Every file of the folder, but the list, is in the list or in a folder that is."""
    folder, files = finished_run
    listed = json.loads((folder / "run_files.json").read_text(encoding="utf-8"))["files"]
    unlisted = [file for file in files if not any(file == path or file.startswith(f"{path}/") for path in listed)]
    assert unlisted == ["run_files.json"] and all(listed.values())
    assert {"README.md", "report.json", "trace_rank0.json", "checkpoint-2"} <= listed.keys()
    assert len(links_of(folder)) == 3  # a sheet and two clips


@pytest.mark.parametrize("version", ["this", "older"])
def test_a_second_run_moves_all_of_the_first_and_only_that(earlier, version):
    """Trained again in the same folder, without an evaluation; an older version has left no list."""
    folder, files = earlier
    own = ["notes.txt", "samples/mine.mp4", "checkpoint-best/policy.json", "checkpoint-2-backup/notes.txt",
           "evaluations/notes.md", "samples/step_000002/eval/mine.mp4", "transformer/config.json"]  # fmt: skip
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    if version == "older":
        (folder / "run_files.json").unlink()
    made = trainer(folder, max_steps=1)
    made.train()
    assert files_in(folder / "earlier-1") | {"run_files.json"} == files
    made.save_model()
    now = {"run_files.json", "README.md", "pytorch_lora_weights.safetensors"}
    assert {file for file in files_in(folder) if not file.startswith("earlier-")} == now | set(own)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert links_of(folder) == [] and "Before and after" not in card and "widget" not in card


def test_another_layout_of_the_adapter_is_set_aside(tmp_path):
    """Wan 2.2's second expert was trained here before: nothing says or loads transformer_2 now."""
    settings = {"lora_denoisers": ["transformer_2"], "guidance_scale": 5.0}
    trainer(tmp_path, model=quiet(BUILD["wan22_a14b"]()), **settings).save_model()
    assert "transformer_2" in (tmp_path / "README.md").read_text(encoding="utf-8")
    trainer(tmp_path, alive=True).save_model()  # whose check reads the adapter back
    assert "transformer_2" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "earlier-1" / "transformer_2" / "pytorch_lora_weights.safetensors").exists()
    assert not (tmp_path / "transformer_2").exists()


def test_a_user_s_files_are_neither_overwritten_nor_pushed(tmp_path):
    """A project's folder as output_dir: its README, report, clips and LoRA of another program stay its own."""
    folder = tmp_path / "project"
    own = ["README.md", "report.md", "samples/before.png", "samples/step_one/a.mp4", "style/adapter_config.json",
           "style/adapter_model.safetensors", "runs/theirs/events.out.tfevents.1"]  # fmt: skip
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    made = trainer(folder, eval_dataset=prompts(2), max_steps=1, num_sample_videos=1)
    made.train()
    made.save_model()
    kept = [name for name in own if name != "report.md"]
    assert all((folder / name).read_text(encoding="utf-8") == "mine" for name in kept)
    assert (folder / "earlier-1" / "report.md").read_text(encoding="utf-8") == "mine"  # we write one, too
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    assert "style" not in card and "step_one" not in card and "load_lora_weights" in card
    with running_hub() as server:
        push(server, tmp_path, folder=str(folder), repo_id="me/mine")
    sent = server.commits[0]["files"]
    assert sent["README.md"].decode() == card and b"mine" not in sent.values()
    assert set(sent) == {
        "README.md", "report.md", "pytorch_lora_weights.safetensors", "samples/before_after_eval.png",
        *(f"samples/step_00000{step}/eval/{file}" for step in (0, 1) for file in ("000.mp4", "sheet.png")),
    }


def test_a_longer_run_that_is_stopped_does_not_show_the_shorter_one_s_results(earlier):
    """Prolonged from its last checkpoint and stopped a step later: the report and the clips were of step 2."""
    folder, _ = earlier
    made = trainer(folder, eval_dataset=prompts(2), max_steps=4, callbacks=[Interrupt(3)], **SAVES)
    with pytest.raises(KeyboardInterrupt):
        made.train(resume_from_checkpoint=True)
    made.save_model()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert links_of(folder) == [] and "Before and after" not in card
    assert not list(folder.glob("earlier-*"))  # of a run that goes on nothing is moved
    resumed = trainer(folder, eval_dataset=prompts(2), max_steps=3)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed.save_model()
    assert all("step_000003" in link or "before_after" in link for link in links_of(folder))
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["from_step"] == 0
    trainer(folder, max_steps=1).train()  # and what had been of no use any more is set aside, too
    assert {path.name for path in folder.iterdir()} == {"earlier-1", "run_files.json"}


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_stopped_before_the_first_checkpoint(earlier):
    """A new run in the folder, Ctrl-C at once, saved all the same; then the first run's goes on from earlier-1."""
    folder, _ = earlier
    made = trainer(folder, eval_dataset=prompts(2), max_steps=4, callbacks=[Interrupt(1)], **SAVES)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.save_model()
    assert links_of(folder) == [] and last_checkpoint(str(folder)) is None
    again = trainer(folder, max_steps=3)
    again.train(resume_from_checkpoint=str(folder / "earlier-1" / "checkpoint-2"))
    assert again.state.global_step == 3 and (folder / "earlier-2" / "README.md").exists()


def test_two_trainers_of_one_folder_in_a_notebook(tmp_path):
    """Both made before either has trained; then the first one saves again."""
    first, second = (trainer(tmp_path, eval_dataset=prompts(2), max_steps=steps) for steps in (2, 1))
    first.train()
    first.save_model()
    second.train()
    second.save_model()
    assert len(links_of(tmp_path)) == 3 and all("step_000002" not in link for link in links_of(tmp_path))
    adapter = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    assert (tmp_path / "earlier-1" / "samples" / "step_000002").exists()
    first.save_model()
    assert links_of(tmp_path) == []  # the clips that are there now are the second one's
    assert (tmp_path / "earlier-2" / "pytorch_lora_weights.safetensors").read_bytes() == adapter


def test_a_notebook_evaluates_before_it_trains(tmp_path):
    """What `evaluate()` wrote before `train()` belongs to the run, and is what it is compared with."""
    trainer(tmp_path, eval_dataset=prompts(3), max_steps=1).train()
    made = trainer(tmp_path, eval_dataset=prompts(2), max_steps=1, eval_on_start=False)
    made.evaluate()
    made.train()
    made.save_model()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["from_step"] == 0 and report["comparison"]["eval"]["reward"]["n"] == 2
    assert {path.name for path in tmp_path.glob("earlier-*")} == {"earlier-1"}
    assert len(links_of(tmp_path)) == 3


def test_saved_elsewhere_the_card_goes_with_the_adapter(tmp_path):
    """`save_model("to_share")`: adapter and card are there, and output_dir has neither."""
    made = trainer(tmp_path / "run", eval_dataset=prompts(2), max_steps=1)
    made.train()
    (tmp_path / "to_share" / "transformer").mkdir(parents=True)
    (tmp_path / "to_share" / "transformer" / "adapter_config.json").write_text("{}", encoding="utf-8")
    made.save_model(tmp_path / "to_share")
    assert not (tmp_path / "run" / "README.md").exists()
    card = (tmp_path / "to_share" / "README.md").read_text(encoding="utf-8")
    assert "Before and after" in card and links_of(tmp_path / "to_share") == [] and "PeftModel" not in card
    with pytest.raises(ValueError, match="holds no adapter"):
        made.push_to_hub()


def test_the_best_model_s_card_shows_the_best_step(tmp_path):
    """load_best_model_at_end: the numbers are of step 2, and so are the clips."""

    def falling(prompts, videos, trainer_state, **columns):
        return [-float(trainer_state.global_step)] * len(prompts)

    made = trainer(tmp_path, [brightness, falling], reward_weights=[1e-9, 1.0], eval_dataset=prompts(2), max_steps=5,
                   eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                   load_best_model_at_end=True)
    made.train()
    made.save_model()
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["to_step"] == 2
    clips = [link for link in links_of(tmp_path) if link.endswith(".mp4")]
    assert clips == [f"samples/step_000002/eval/00{i}.mp4" for i in (0, 1)]
    written = {path.name for path in (tmp_path / "evaluations").iterdir()}
    assert written == {f"step_00000{step}.json" for step in (0, 2, 4, 5)}
    last = (tmp_path / "evaluations" / "step_000005.json").read_bytes()
    made.evaluate()  # of the best model, which is not that of step 5
    assert (tmp_path / "evaluations" / "step_000005.json").read_bytes() == last


def test_old_checkpoints_are_deleted_and_nothing_else(tmp_path):
    """save_total_limit beside a user's own checkpoint-best, checkpoint-2-backup and an empty checkpoint-99."""
    for name in ("checkpoint-best", "checkpoint-2-backup", "checkpoint-99", ".incomplete-thoughts", "checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine", encoding="utf-8")
    trainer(tmp_path, max_steps=4, save_total_limit=2, **SAVES).train()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-best", "checkpoint-2-backup", "checkpoint-99", ".incomplete-thoughts", "checkpoint-3",
                    "checkpoint-4", "earlier-1", "run_files.json"}  # fmt: skip
    assert (tmp_path / "earlier-1" / "checkpoint-1" / "notes.txt").exists()  # ours took its place
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    made = trainer(tmp_path, max_steps=5)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 5


def test_the_newest_and_the_best_checkpoint_stay(tmp_path):
    """Resumed from an earlier checkpoint, the newest has not the highest number."""
    trainer(tmp_path, max_steps=3, **SAVES).train()
    made = trainer(tmp_path, max_steps=3, save_total_limit=2, callbacks=[StopAt(2)], **SAVES)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_a_list_that_was_written_by_others_moves_nothing_outside(tmp_path):
    """run_files.json comes with a downloaded folder: an entry that leads out of it is no file of the run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    files = {"../precious.txt": True, str(tmp_path / "precious.txt"): True, ".": True, "": True}
    (folder / "run_files.json").write_text(json.dumps({"run": "x", "files": files}), encoding="utf-8")
    assert RunFiles(folder).begin() is None and (tmp_path / "precious.txt").exists() and folder.exists()


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "", "CON", "nul.txt", "x" * 300, " a", "a.", "a\nb", 3,
                                  "wh?t", "."])
def test_a_name_of_an_evaluation_set_that_cannot_name_a_file(tmp_path, name):
    """Refused before a model is loaded; nothing is written anywhere."""
    with pytest.raises(ValueError, match=r"eval_dataset\[.*samples and sheets are filed under it"):
        trainer(tmp_path / "run", model="no/such-model", eval_dataset={name: prompts(2)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_names_of_evaluation_sets_that_differ_in_case(tmp_path):
    """On a Mac their files would be the same."""
    with pytest.raises(ValueError, match="upper and lower case"):
        trainer(tmp_path, model="no/such-model", eval_dataset={"new": prompts(2), "New": prompts(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="model='no/such-model'"):  # a good name gets further
            trainer(tmp_path, model="no/such-model", eval_dataset={"held out, 新": prompts(2)})
