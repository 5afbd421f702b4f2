"""Folders as people have them: an earlier run in the same place, their own files next to ours, a stop in the middle.

Such cases come from trainers' issue trackers: a card with another run's samples, a folder `checkpoint-best` that the
rotation of checkpoints removed, a README that a push overwrote.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
from distributed.processes import together
from fake_hub import running_hub
from tiny_pipelines import BUILD, quiet
from trainers.tiny_runs import StopAt, brightness, config, prompts, trainer
from transformers import TrainerCallback

from pisces_rl.hub import push_adapter
from pisces_rl.run_files import RunFiles
from pisces_rl.trainers.base.run.resume import last_checkpoint

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
    made = trainer(
        folder,
        eval_dataset=prompts(2),
        max_steps=2,
        log_completions=True,
        trace_steps=1,
        report_to="tensorboard",
        **SAVES,
    )
    made.train()
    made.save_model()
    return folder, files_in(folder)


@pytest.fixture
def earlier(finished_run, tmp_path):
    """A copy of it in a folder that may be changed."""
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
    own = [
        "notes.txt",
        "samples/mine.mp4",
        "checkpoint-best/policy.json",
        "checkpoint-2-backup/notes.txt",
        "evaluations/notes.md",
        "samples/step_000002/eval/mine.mp4",
        "transformer/config.json",
    ]
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    if version == "older":
        (folder / "run_files.json").unlink()
    made = trainer(folder, max_steps=1)
    made.train()
    assert files_in(folder / "earlier-1") | {"run_files.json"} == files
    made.save_model()
    now = {"run_files.json", "README.md", "pytorch_lora_weights.safetensors", "run.json", "report.html"}
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
    own = [
        "README.md",
        "report.md",
        "samples/before.png",
        "samples/step_one/a.mp4",
        "style/adapter_config.json",
        "style/adapter_model.safetensors",
        "runs/theirs/events.out.tfevents.1",
    ]
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
        push_adapter(folder, "me/mine")
    sent = server.commits[0]["files"]
    assert sent["README.md"].decode() == card and b"mine" not in sent.values()
    assert set(sent) == {
        "README.md",
        "report.md",
        "pytorch_lora_weights.safetensors",
        "samples/before_after_eval.png",
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
    assert not list(folder.glob("earlier-*"))  # a resumed run moves nothing
    resumed = trainer(folder, eval_dataset=prompts(2), max_steps=3)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed.save_model()
    assert all("step_000003" in link or "before_after" in link for link in links_of(folder))
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["from_step"] == 0
    trainer(folder, max_steps=1).train()  # and what had been of no use any more is set aside, too
    assert {path.name for path in folder.iterdir()} == {"earlier-1", "run_files.json", "run.json", "report.html"}


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_stopped_before_the_first_checkpoint(earlier):
    """A new run in the folder is stopped at once by Ctrl-C and still saved; then the first resumes from earlier-1."""
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
    """What `evaluate()` wrote before `train()` belongs to the run and is its baseline."""
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

    made = trainer(
        tmp_path,
        [brightness, falling],
        reward_weights=[1e-9, 1.0],
        eval_dataset=prompts(2),
        max_steps=5,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
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
    """save_total_limit in a folder with a user's checkpoint-best, checkpoint-2-backup and an empty checkpoint-99."""
    for name in ("checkpoint-best", "checkpoint-2-backup", "checkpoint-99", ".incomplete-thoughts", "checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine", encoding="utf-8")
    trainer(tmp_path, max_steps=4, save_total_limit=2, **SAVES).train()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "checkpoint-best",
        "checkpoint-2-backup",
        "checkpoint-99",
        ".incomplete-thoughts",
        "checkpoint-3",
        "checkpoint-4",
        "earlier-1",
        "run_files.json",
        "run.json",
        "report.html",
    }
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


BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "num_sample_videos": 0} | SAVES


def falling(prompts, videos, trainer_state, **columns):
    return [-float(trainer_state.global_step)] * len(prompts)


@pytest.fixture(scope="module")
def best_is_first(tmp_path_factory):
    """A run of two steps whose first checkpoint is the best."""
    folder = tmp_path_factory.mktemp("best") / "run"
    trainer(folder, falling, eval_dataset=prompts(1), eval_on_start=False, **BEST).train()
    return folder


def test_checkpoints_alone_were_copied_to_another_machine(best_is_first, tmp_path):
    """The best checkpoint comes without its evaluation: after all of the training, that file was not found."""
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(best_is_first / name, tmp_path / "run" / name)
    made = trainer(tmp_path / "run", falling, eval_dataset=prompts(1), **BEST | {"max_steps": 3})
    made.train(resume_from_checkpoint=True)
    assert made.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    assert made.last_evaluation["eval"]["prompts"] == ["clip 0"]
    assert (tmp_path / "run" / "evaluations" / "step_000001.json").is_file()
    made.save_model()


def test_a_moved_run_resumes_with_its_best_checkpoint(best_is_first, tmp_path):
    """Resumed from earlier-1/checkpoint-2: the best is another checkpoint in earlier-1."""
    shutil.copytree(best_is_first, tmp_path / "run" / "earlier-1")
    state = tmp_path / "run" / "earlier-1" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8").replace(str(best_is_first), "/gone"), encoding="utf-8")
    made = trainer(tmp_path / "run", falling, eval_dataset=prompts(1), **BEST | {"max_steps": 3})
    made.train(resume_from_checkpoint=str(state.parent))
    assert made.state.best_model_checkpoint == str(tmp_path / "run" / "earlier-1" / "checkpoint-1")
    assert made._saved_step == 1


@pytest.mark.parametrize(
    "settings",
    [{"save_total_limit": 2}, {"save_total_limit": 1, "eval_dataset": 1} | BEST],
    ids=["two", "one and the best"],
)
def test_a_checkpoint_that_a_user_put_there_is_not_rotated_away(settings, tmp_path):
    """Copied back from another run, or a folder of notes that is named like one."""
    if "eval_dataset" in settings:
        settings = settings | {"eval_dataset": prompts(1)}
    trainer(tmp_path / "other", max_steps=1, **SAVES).train()

    class CopiesBack(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                shutil.copytree(tmp_path / "other" / "checkpoint-1", tmp_path / "run" / "checkpoint-77")
                (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)

    made = trainer(
        tmp_path / "run", callbacks=[CopiesBack()], **{"max_steps": 3, "learning_rate": 0.0} | SAVES | settings
    )
    made.train()
    ours = {"checkpoint-1", "checkpoint-3"} if "eval_dataset" in settings else {"checkpoint-2", "checkpoint-3"}
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert left == {"checkpoint-77", "checkpoint-best"} | ours and made.args.save_total_limit


def files_of_a_run(folder, *paths: str) -> None:
    """What a run has listed and written."""
    files = RunFiles(folder)
    files.begin()
    files.claim(*paths)
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("ours", encoding="utf-8")


def between_disks(*paths, **kwargs):
    """What renaming from one disk to another does."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), *paths[:1])


@pytest.mark.parametrize("disk", ["same", "another"])
def test_a_samples_folder_linked_to_another_disk(disk, tmp_path, monkeypatch):
    """output_dir/samples is a link: the link stays, and what a run wrote behind it moves."""
    larger, run = tmp_path / "larger", tmp_path / "run"
    larger.mkdir()
    run.mkdir()
    (run / "samples").symlink_to(larger)
    files_of_a_run(run, "report.md", "samples/step_000001/eval/000.mp4")
    if disk == "another":
        monkeypatch.setattr(os, "rename", between_disks)
    assert RunFiles(run).begin() == run / "earlier-1"
    assert files_in(run / "earlier-1") == {"report.md", "samples/step_000001/eval/000.mp4", "run_files.json"}
    assert (run / "samples").is_symlink() and list(larger.iterdir()) == []


@pytest.mark.parametrize("kept_a_list", [True, False])
def test_a_user_s_model_card_is_not_pushed_as_ours(kept_a_list, tmp_path):
    """A user's file model_card.md next to our card."""
    folder = tmp_path / "run"
    files_of_a_run(folder, "README.md", "pytorch_lora_weights.safetensors")
    (folder / "model_card.md").write_text("mine", encoding="utf-8")
    if not kept_a_list:
        (folder / "run_files.json").unlink()
    with running_hub() as server:
        push_adapter(folder, "me/mine")
        push_adapter(folder, "me/all", allow_patterns=["*"])
    sent = [commit["files"] for commit in server.commits]
    assert sent[0].keys() == {"README.md", "pytorch_lora_weights.safetensors"} and sent[0]["README.md"] == b"ours"
    assert (sent[1]["README.md"], sent[1]["model_card.md"]) == (b"ours", b"mine")


def test_a_readme_that_replaced_our_card_stays(tmp_path):
    """After the first run the user writes a README; the second run leaves it there."""
    files_of_a_run(tmp_path, "README.md", "report.md")
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    files = RunFiles(tmp_path)
    assert files.begin() == tmp_path / "earlier-1"
    assert files_in(tmp_path / "earlier-1") == {"report.md", "run_files.json"}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    assert files.claim_card() == tmp_path / "model_card.md" and "README.md" not in files.current()


def test_the_card_shows_no_clips_of_another_evaluation(tmp_path):
    """A notebook evaluates on further prompts after the training, then saves."""
    made = trainer(tmp_path, eval_dataset=prompts(2), max_steps=1, eval_on_start=False)
    made.train()
    other = prompts(1).map(lambda row: {"prompt": "another set's"})
    made.evaluate(other)
    made.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "clip 0" in card and "another set" not in card
    assert all("other" not in link for link in links_of(tmp_path))
    assert (tmp_path / "samples" / "other_000001" / "eval" / "000.mp4").is_file()
    kept = json.loads((tmp_path / "samples" / "step_000001" / "eval" / "rewards.json").read_text(encoding="utf-8"))
    assert kept["prompts"] == ["clip 0", "clip 1"]


@pytest.mark.parametrize(
    "inside, moves",
    [
        (".", True),
        ("transformer", True),
        ("transformer_2/pytorch_lora_weights.safetensors", True),
        ("checkpoint-2", True),
        ("checkpoint-2/pytorch_lora_weights.safetensors", True),
        ("pytorch_lora_weights.safetensors", True),
        ("start", False),
        ("start.safetensors", False),
        ("checkpoint-77", False),
    ],
)
def test_continuing_from_a_file_the_run_would_move(inside, moves, tmp_path):
    """Refused if the folder's list says that a run wrote it; a user's own file may be there."""
    files_of_a_run(
        tmp_path,
        "checkpoint-2/pytorch_lora_weights.safetensors",
        "transformer/adapter_model.safetensors",
        "transformer_2/pytorch_lora_weights.safetensors",
    )
    for own in (
        "start/adapter_model.safetensors",
        "start.safetensors",
        "checkpoint-77/adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    ):
        (tmp_path / own).parent.mkdir(exist_ok=True)
        (tmp_path / own).write_text("mine", encoding="utf-8")
    refused = pytest.raises(ValueError, match="lies in output_dir") if moves else contextlib.nullcontext()
    with refused:
        config(tmp_path, continue_from=str(tmp_path / inside))


@pytest.mark.parametrize("place", ["tb", "."])
def test_event_files_of_others_in_the_logging_folder_stay(place, monkeypatch, tmp_path):
    """TENSORBOARD_LOGGING_DIR holds a baseline to compare with; it may be output_dir itself."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / place))
    theirs = [tmp_path / place / name / "events.out.tfevents.1.host" for name in (".", "baseline")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    trainer(tmp_path, max_steps=1, report_to="tensorboard").train()
    (own,) = {path for path in tmp_path.rglob("events.out.*")} - {*theirs}
    RunFiles(tmp_path).begin()
    assert (tmp_path / "earlier-1" / own.relative_to(tmp_path)).is_file() and not own.exists()
    assert all(path.is_file() for path in theirs)


NODE = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.environ["LOCAL_RANK"] = "0"  # the only process of its machine
os.environ["HF_HUB_OFFLINE"] = "1"
from trainers.tiny_runs import trainer
folder = os.path.join(sys.argv[2], "node" + os.environ["RANK"])
settings = dict(save_strategy="steps", save_steps=1, save_total_limit=1, save_on_each_node=True)
trainer(folder, max_steps=2, per_device_train_batch_size=2, **settings).train()
"""


@pytest.mark.slow
def test_two_machines_that_both_save(tmp_path):
    """save_on_each_node, with an earlier run's files on each machine's own disk."""
    for node in ("node0", "node1"):
        files_of_a_run(tmp_path / node, "report.md", "checkpoint-9/policy.json")
    (tmp_path / "node.py").write_text(NODE, encoding="utf-8")
    done = together(str(tmp_path / "node.py"), str(Path(__file__).parents[1]), str(tmp_path), timeout=100)
    assert [process.returncode for process in done] == [0, 0], done[1].stdout[-3000:]
    for node, page in ((tmp_path / "node0", {"report.html", "run.json"}), (tmp_path / "node1", set())):
        assert {path.name for path in node.iterdir()} == {"earlier-1", "checkpoint-2", "run_files.json", *page}
        assert (node / "earlier-1" / "checkpoint-9" / "policy.json").is_file()
    assert [process.stdout.count("held an earlier run") for process in done] == [1, 0]


def test_a_foreign_file_list_moves_nothing_outside_the_folder(tmp_path):
    """run_files.json comes with a downloaded folder: an entry that points outside it is not a file of the run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    files = {"../precious.txt": True, str(tmp_path / "precious.txt"): True, ".": True, "": True}
    (folder / "run_files.json").write_text(json.dumps({"run": "x", "files": files}), encoding="utf-8")
    assert RunFiles(folder).begin() is None and (tmp_path / "precious.txt").exists() and folder.exists()


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "a\\b", "", "CON", "nul.txt", "x" * 300, " a", "a.", "a\nb", 3, "wh?t", "."]
)
def test_a_name_of_an_evaluation_set_that_cannot_name_a_file(tmp_path, name):
    """Refused before a model is loaded; nothing is written anywhere."""
    with pytest.raises(ValueError, match=r"eval_dataset\[.*names of samples and sheets contain it"):
        trainer(tmp_path / "run", model="no/such-model", eval_dataset={name: prompts(2)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_names_of_evaluation_sets_that_differ_in_case(tmp_path):
    """On a Mac their files would be the same."""
    with pytest.raises(ValueError, match="only in case"):
        trainer(tmp_path, model="no/such-model", eval_dataset={"new": prompts(2), "New": prompts(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="model='no/such-model'"):  # a good name gets further
            trainer(tmp_path, model="no/such-model", eval_dataset={"held out, 新": prompts(2)})
