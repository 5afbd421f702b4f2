"""The time line: parts sum to the time that passed, traces are Chrome's, and a run logs, prints and writes it."""

import errno
import json
import threading
import time

import pytest
import test_backprop_trainer as backprop
import tiny_runs
import torch
from datasets import Dataset
from rich.console import Console
from tiny_runs import config, prompts, trainer

from pisces_rl.rewards import RewardError
from pisces_rl.trainers.base.watch import timeline
from pisces_rl.trainers.base.watch.timeline import Timeline, timeline_table

CPU = torch.device("cpu")


def started(**settings) -> Timeline:
    timeline = Timeline(CPU, **settings)
    timeline.start()
    return timeline


def spans(path) -> list[dict]:
    """The complete events of a trace, in the order of their starts."""
    trace = json.loads(path.read_text())
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    found = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for event in found:
        assert event.keys() == {"ph", "pid", "tid", "name", "ts", "dur"} and event["dur"] >= 0
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


# --- the arithmetic --------------------------------------------------------------------------------------------------


def test_a_span_counts_its_own_time_and_parts_sum_to_what_passed():
    timeline = started()
    begin = time.perf_counter()
    with timeline.span("rollout"):
        time.sleep(0.02)
        with timeline.span("decode"):
            time.sleep(0.06)
        time.sleep(0.02)
    time.sleep(0.01)
    parts = timeline.read()
    passed = time.perf_counter() - begin
    assert parts["rollout"] >= 0.04 and parts["decode"] >= 0.06 and parts["idle"] >= 0.01
    assert sum(parts.values()) == pytest.approx(passed, abs=0.02)  # decode in both would be .06 more


def test_a_whole_span_counts_what_is_inside():
    timeline = started()
    with timeline.span("evaluation", whole=True), timeline.span("rollout"), timeline.span("decode"):
        time.sleep(0.01)
    parts = timeline.read()
    assert parts.keys() == {"evaluation", "idle"} and parts["evaluation"] >= 0.01


def test_a_reading_is_of_the_time_since_the_last_also_inside_a_span():
    timeline = started()
    with timeline.span("update"):
        time.sleep(0.1)
        first = timeline.read()
        time.sleep(0.01)
    with timeline.span("rewards"), timeline.span("rewards/bright"):
        time.sleep(0.01)
    second = timeline.read()
    assert 0.1 <= first["update"] and 0.01 <= second["update"] < 0.1
    assert 0.01 <= second["rewards"] and "rewards/bright" not in second
    parts = timeline.parts()
    assert parts["update"] == pytest.approx(first["update"] + second["update"])
    assert parts["rewards/bright"] >= 0.01 and parts["rewards"] < parts["rewards/bright"]


def test_another_thread_has_its_own_spans():
    timeline = started(trace_steps=1)

    def work():
        for _ in range(2):
            with timeline.span("rewards/bright"):
                time.sleep(0.03)
            time.sleep(0.01)

    begin = time.perf_counter()
    with timeline.span("rollout"):
        thread = threading.Thread(target=work, name="rewards")
        thread.start()
        thread.join()
    parts = timeline.parts()
    assert parts["beside/rewards/bright"] >= 0.06 and parts["rollout"] >= 0.08
    own = {name: seconds for name, seconds in parts.items() if not name.startswith("beside/")}
    assert sum(own.values()) == pytest.approx(time.perf_counter() - begin, abs=0.02)  # not .06 more
    assert timeline.read().keys() == {"rollout", "idle"}


def test_nothing_is_counted_outside_a_run():
    timeline = Timeline(CPU)
    with timeline.span("rollout"):
        assert timeline.read() == {} and timeline.parts() == {}
        timeline.start()
    timeline.stop()
    with timeline.span("update"):
        pass
    assert timeline.parts().keys() == {"idle"} and timeline.read() == {}


def test_a_span_that_raises_ends():
    timeline = started()
    with pytest.raises(KeyError), timeline.span("rollout"):
        raise KeyError("prompt")
    timeline.read()
    time.sleep(0.01)
    assert timeline.read().keys() == {"idle"}


def test_memory_is_bounded(tmp_path):
    """A long run without logs, of which two steps are traced."""
    timeline = started(trace_steps=2)
    for _ in range(15_000):
        with timeline.span("rollout"):
            pass
        timeline.step()
        assert len(timeline.main.marks) <= 20_002
    timeline.write_trace(tmp_path / "trace.json")
    assert len(spans(tmp_path / "trace.json")) == 2 and timeline.steps == 15_000


def test_the_trace_nests_as_the_spans_did(tmp_path):
    timeline = started(rank=3, trace_steps=1)
    before = time.time() * 1e6
    with timeline.span("rollout"):
        with timeline.span("text"):
            time.sleep(0.002)
        with timeline.span("decode"):
            time.sleep(0.002)
    timeline.write_trace(tmp_path / "folder" / "trace.json")
    rollout, text, decode = found = spans(tmp_path / "folder" / "trace.json")
    assert [event["name"] for event in found] == ["rollout", "text", "decode"]
    assert {event["pid"] for event in found} == {3}
    assert before - 1e3 <= rollout["ts"] and rollout["ts"] + rollout["dur"] <= time.time() * 1e6 + 1e3
    for inner in (text, decode):
        assert rollout["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= rollout["ts"] + rollout["dur"] + 1
    assert text["ts"] + text["dur"] <= decode["ts"] + 1 and text["dur"] >= 2000


def test_the_table_has_shares_of_the_step():
    parts = {
        "idle": 1.0,
        "update": 4.0,
        "rewards": 0.5,
        "rewards/bright": 0.5,
        "rollout": 4.0,
        "saving": 3.0,
        "beside/rewards/red": 2.0,
    }
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(timeline_table(parts, 2, "time line"))
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in console.export_text().splitlines()
        if line.startswith("│") and (cells := line.strip("│").split("│"))
    }
    assert rows["rollout"] == ["2.000", "40.0 %"] and rows["rewards"] == ["0.500", "10.0 %"]
    assert rows["bright"] == ["0.250", "5.0 %"] and rows["step"] == ["5.000", "100.0 %"]
    assert rows["in parallel: rewards/red"] == ["1.000", ""] and rows["outside the steps: saving"] == [
        "3.000 in total",
        "",
    ]
    assert list(rows)[:5] == ["rollout", "rewards", "bright", "update", "idle"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_timing_does_not_synchronise():
    device = torch.device("cuda")
    timeline = Timeline(device)
    timeline.start()
    begin = time.perf_counter()
    with timeline.span("rollout"), timeline.span("decode"):
        torch.cuda._sleep(400_000_000)  # cycles: a fifth of a second
    with timeline.span("update"):
        pass
    assert time.perf_counter() - begin < 0.05  # the host is ahead of the device
    parts = timeline.read()
    assert parts["decode"] > 0.1 and parts["update"] < 0.01
    assert sum(parts.values()) == pytest.approx(time.perf_counter() - begin, abs=0.01)


# --- runs ------------------------------------------------------------------------------------------------------------


def logged_parts(made) -> list[dict[str, float]]:
    rows = [
        {key.removeprefix("seconds/"): value for key, value in row.items() if key.startswith("seconds/")}
        for row in made.state.log_history
    ]
    return [{key: value for key, value in row.items() if "/" not in key} for row in rows if row]


def test_a_run_logs_parts_that_sum_to_its_steps(tmp_path, capsys):
    def slow(prompts, videos, **columns):
        time.sleep(0.1)
        return tiny_runs.brightness(prompts, videos)

    others = Dataset.from_dict({"prompt": ["a prompt", "of the evaluation"]})
    made = trainer(
        tmp_path,
        [slow, tiny_runs.redness],
        data=prompts(1),
        max_steps=3,
        save_strategy="steps",
        save_steps=2,
        eval_dataset=others,
        eval_strategy="steps",
        eval_steps=2,
    )
    begin = time.perf_counter()
    made.train()
    passed = time.perf_counter() - begin
    first, second, third = logged_parts(made)[:3]
    assert {"text", "rollout", "decode", "rewards", "update", "idle"} <= first.keys()
    assert "text" not in third  # the only prompt is known
    for row, step in zip((first, second, third), tiny_runs.logged(made, "step_time")):
        own = sum(row.get(part, 0.0) for part in ("text", "rollout", "decode", "rewards", "update"))
        assert 0.7 * step <= own <= step + 0.2  # and the optimizer's step
        assert 0.1 <= row["rewards"] < own
    assert "evaluation" in first and "evaluation" in third and "saving" in third  # of between this log and the last
    row = next(row for row in made.state.log_history if "seconds/rewards/slow" in row)
    assert row["seconds/rewards/slow"] == pytest.approx(row["seconds/rewards"], rel=0.5)
    total = made.timeline.parts()
    assert total["rewards/slow"] >= 0.3 and total["evaluation"] > 0.3 and sum(total.values()) <= passed
    assert sum(sum(row.values()) for row in logged_parts(made)) <= sum(total.values()) + 1e-6
    printed = capsys.readouterr().out
    assert "time line: mean of 3 steps, 1 x cpu" in printed and "outside the steps: evaluation" in printed
    assert not list(tmp_path.glob("trace*"))


def test_a_trace_is_of_the_first_steps(tmp_path):
    made = trainer(tmp_path, max_steps=3, trace_steps=2, rollout_batch_size=2)
    made.train()
    found = spans(tmp_path / "trace_rank0.json")
    names = [event["name"] for event in found]
    assert names.count("rollout") == 2 and names.count("decode") == 4 and names.count("rewards/brightness") == 2
    assert {"text", "rewards", "update"} <= set(names) and {event["tid"] for event in found} == {0}
    rollout = next(event for event in found if event["name"] == "rollout")
    inside = [e["name"] for e in found if rollout["ts"] < e["ts"] < rollout["ts"] + rollout["dur"]]
    assert inside[-1] == "decode" and inside.count("decode") == 2 and "update" not in inside


def test_evaluation_is_a_part_of_its_own(tmp_path):
    """Its samples and rewards are not the rollout's."""
    made = trainer(tmp_path, eval_dataset=prompts(3), max_steps=1, per_device_eval_batch_size=3)
    made.train()
    parts = made.timeline.parts()
    made.timeline.start()
    made.evaluate()
    made.timeline.stop()
    assert made.timeline.parts().keys() == {"evaluation", "idle"}
    assert parts["evaluation"] > parts["decode"]


def test_backpropagation_has_one_too(tmp_path):
    made = backprop.trainer(tmp_path, max_steps=2, trace_steps=1)
    made.train()
    first, *_ = logged_parts(made)
    assert {"text", "sampling", "decode", "rewards", "update", "idle"} <= first.keys()
    assert "decode" in [event["name"] for event in spans(tmp_path / "trace_rank0.json")]


def test_a_broken_run_leaves_its_trace_and_its_error(tmp_path):
    def breaks(prompts, videos, trainer_state, **columns):
        if trainer_state.global_step == 1:
            raise ValueError("no more")
        return tiny_runs.brightness(prompts, videos)

    made = trainer(tmp_path, breaks, max_steps=3, trace_steps=3)
    with pytest.raises(RewardError, match="no more"):
        made.train()
    assert [event["name"] for event in spans(tmp_path / "trace_rank0.json")].count("rollout") == 2
    made = trainer(tmp_path / "none", trace_steps=1, max_steps=1)
    made.get_train_dataloader = lambda: (_ for _ in ()).throw(OSError("no data"))
    with pytest.raises(OSError, match="no data"):
        made.train()


def test_a_full_disk_costs_the_trace_and_not_the_run(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(timeline, "write_json", full)
    made = trainer(tmp_path, max_steps=1, trace_steps=1, eval_dataset=prompts(1))
    with pytest.warns(UserWarning, match="trace_rank0.json could not be written"):
        made.train()
    assert len(tiny_runs.logged(made, "eval_reward")) == 2


def test_a_negative_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="trace_steps=-1 must not be negative"):
        config(tmp_path, trace_steps=-1)
