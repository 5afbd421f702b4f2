"""docs/models.md is not written from results that are missing, partial or wrong."""

from pathlib import Path

import diffusers
import pytest
import yaml
from tiny_pipelines import BUILD

ROOT = Path(__file__).parents[1]


@pytest.fixture
def models_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import models_table

    return models_table


def rows(family: str, **changed) -> list[dict]:
    return [
        dict(
            family=family,
            pipeline="WanPipeline",
            transition="flow_sde",
            guided=guided,
            checkpointed=checkpointed,
            whole_batch=0.0,
            slice=1e-7,
            adapter_tensors=8,
            with_gradient=8,
            lora_layout="diffusers",
            diffusers="0.42.1",
        )
        | changed
        for guided in (True, False)
        for checkpointed in (True, False)
    ]


def test_a_table_of_complete_results(models_table):
    notes = {"families": {"b": "Only so."}, "refused": {"OtherPipeline": "No scheduler."}}
    given = rows("a") + rows("b", transition="ddim", slice=2e-7)
    assert models_table.complaints(given, ["a", "b"], {}, notes) == []
    text = models_table.table(given, ["a", "b"], notes)
    assert "| a | `WanPipeline` | works | `flow_sde` | 0 | 1.0e-07 | 8 | diffusers |  |" in text
    assert "| b | `WanPipeline` | works with a note | `ddim` | 0 | 2.0e-07 | 8 | diffusers | Only so. |" in text
    assert "| `OtherPipeline` | No scheduler. |" in text


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "a has no result"),
        (rows("a")[:3], "a, flow_sde: 3 of 4 conditions"),
        (rows("a", whole_batch=1e-9), "a breaks the rule"),
        (rows("a", slice=float("nan")), "a breaks the rule"),
        (rows("a", with_gradient=7), "a breaks the rule"),
    ],
)
def test_faulty_results_are_reported(models_table, given, message):
    assert message in "\n".join(models_table.complaints(given, ["a"], {}, {"families": {}, "refused": {}}))


def test_notes_name_existing_families_and_pipelines(models_table):
    notes = yaml.safe_load(models_table.NOTES.read_text())
    assert set(notes["families"]) <= set(BUILD)
    assert "not a family" in models_table.complaints([], [], {}, {"families": {"gone": ""}, "refused": {}})[0]
    for name in notes["refused"]:
        assert hasattr(diffusers, name), name


def test_the_later_result_wins(models_table, tmp_path):
    import json
    import os

    for number, error in enumerate((1e-6, 1e-7)):
        file = tmp_path / f"gw{1 - number}.json"
        file.write_text(json.dumps(rows("a", slice=error)))
        os.utime(file, (number, number))
    assert {row["slice"] for row in models_table.read_results(tmp_path)} == {1e-7}


def test_the_page_lists_every_family():
    page = (ROOT / "docs" / "models.md").read_text()
    missing = [family for family in BUILD if f"| {family} | `" not in page]
    assert not missing, f"docs/models.md lacks {missing}: python benchmarks/models_table.py --run"
