"""Text as people write it, where it becomes markup, Markdown, Python or a file: prompts, names, folders.

Such cases come from issue trackers: brackets that a console swallowed, a prompt that became a link, a locale that was
not UTF-8.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from trainers.tiny_runs import brightness, trainer

from pisces_rl import hub
from pisces_rl.markdown import code, escape, one_line
from pisces_rl.trainers.base.run.report import markdown_comparison, print_comparison, run_console
from pisces_rl.trainers.base.watch.timeline import timeline_table

NASTY = [
    r"a cat \](https://evil.example)",
    "a cat](https://evil.example)",
    "dog\r# heading",
    "one\x85# two",
    "a|b||c",
    "`code` ``more``",
    "<script>alert(1)</script>",
    "<b>bold</b> &lt;tag&gt;",
    "# top ##",
    "*stars* __lines__ _it_",
    "back\\slash\\",
    "![x](y.png)",
    "[ref]: /url",
    "~~gone~~",
    "$x$",
    "https://evil.example www.evil.example",
    "---\nlicense: mit\n---",
    "一只猫在弹钢琴",
    "snake_case_name",
    "null\x00 bell\x07 escape\x1b[31m",
    ":cat: @cat",
    "\u2028line",
    "half \ud83d of one",
]
ROW = {"n": 2, "before": 1.0, "after": 2.0, "difference": 1.0, "low": 0.5, "high": 1.5}
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def inline(markdown: str) -> list:
    return [token for token in PARSER.parse(markdown) if token.type == "inline"]


def shown(token) -> str:
    """The text that a reader sees of an inline token; what is not text is named."""
    return "".join(child.content if child.type == "text" else f"<{child.type}>" for child in token.children)


@pytest.mark.parametrize("text", NASTY)
def test_text_stays_text_in_markdown(text):
    """In a heading, a table cell, a link and a paragraph."""
    (heading,) = inline(f"# {escape(text)}")
    _, cell, after = inline(f"| a | b |\n|---|---|\n| {escape(text)} | end |")[1:]
    link, paragraph = inline(f"- [{escape(text)}](a.mp4)\n\nA model {escape(text)}.")
    assert shown(heading) == shown(cell) == one_line(text) and shown(after) == "end"
    assert shown(link) == f"<link_open>{one_line(text)}<link_close>"
    assert shown(paragraph) == f"A model {one_line(text)}."
    assert not re.search(r"(?<!\\)://|www\.", escape(text))  # GitHub and the Hub link bare addresses
    (span,) = inline(f"a {code(text)} b")
    assert [child.type for child in span.children] == ["text", "code_inline", "text"]
    assert span.children[1].content == one_line(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_any_text_stays_text_in_a_table(text):
    """Whatever a reward or a dataset is called."""
    cells = inline(f"| a | b |\n|---|---|\n| x{escape(text)}x | end |")
    assert [shown(cell) for cell in cells] == ["a", "b", f"x{one_line(text)}x", "end"]


@pytest.fixture
def sample_folder(tmp_path):
    """Clips of prompts as people write them, of a set with a name as they give it."""
    from pisces_rl.whole_files import write_json

    folder = tmp_path / "samples" / "step_000001" / "100% #1 (new)"
    write_json(folder / "rewards.json", {"prompts": NASTY[:4]})
    for row in range(4):
        (folder / f"{row:03d}.mp4").write_bytes(b"clip")
    (tmp_path / "samples" / "before_after_100% #1 (new).png").write_bytes(b"sheet")
    return tmp_path


def test_a_card_of_such_text(sample_folder):
    """Prompts, scores, sets, settings, the model's and the trainer's name: a table, links and headings as meant."""
    scores = {name: {text: ROW for text in NASTY} for name in NASTY[:3]}
    model = 'my "model" `x` # | [a](b)\\'
    card = hub.model_card(model, "Video <GRPO>", "WanPipeline", {text: text for text in NASTY}, scores, sample_folder)
    front, body = re.match(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    widget = yaml.safe_load(front)["widget"]
    assert [w["text"] for w in widget] == [one_line(prompt) for prompt in NASTY[:4]]
    tokens = PARSER.parse(body)
    headings = [shown(tokens[i + 1]) for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        f"{model}, LoRA trained with Video <GRPO>",
        "Use",
        "Before and after",
        "Samples",
        "Training",
        "Citation",
    ]
    children = [child for token in tokens for child in token.children or ()]
    links = [child.attrs["href"] for child in children if child.type == "link_open"]
    assert [w["output"]["url"] for w in widget] == links
    pictures = [child.attrs["src"] for child in children if child.type == "image"]
    assert all((sample_folder / unquote(path)).is_file() for path in links + pictures) and len(pictures) == 1
    rows = [
        [shown(t) for t in tokens[i:] if t.type == "inline"]
        for i, token in enumerate(tokens)
        if token.type == "table_open"
    ]
    assert [rows[0][6 + 6 * i + 1] for i in range(3 * len(NASTY))] == [one_line(text) for text in NASTY] * 3
    assert rows[1][2 : 2 + 2 * len(NASTY)] == [one_line(text) for text in NASTY for _ in "ab"]
    assert not [token for token in tokens if token.type.startswith("html")]
    assert not [child for child in children if child.type.startswith("html")]
    (snippet,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    loads = []
    fake = {"from_pretrained": lambda path, **kwargs: loads.append(path)}
    line = next(line for line in snippet.splitlines() if "from_pretrained" in line)
    exec(line, {"WanPipeline": type("WanPipeline", (), fake), "torch": __import__("torch")})
    assert loads == [f"path/to/{model}"]
    card.encode("utf-8")


def test_a_report_of_such_text():
    """report.md, whose rows are sets and scores."""
    cells = inline(markdown_comparison({name: {"acc|[top1]": ROW} for name in NASTY}))
    assert [shown(cell) for cell in cells[6::6]] == [one_line(name) for name in NASTY]
    assert {shown(cell) for cell in cells[7::6]} == {"acc|[top1]"}


@pytest.mark.parametrize("own", [True, False])
def test_brackets_are_no_markup_in_tables(own, capsys):
    """Scores `acc[top1]` and `len[/word]`, on our console and on one that reads markup."""
    console = Console(width=120) if own else None
    print_comparison({"[red]set[/red]": {"acc[top1]": ROW, "len[/word]": ROW}}, "run[lr=1e-4]", console)
    parts = {"rewards/len[/word]": 1.0, "idle": 1.0, "beside/rewards/acc[top1]": 1.0}
    (console or run_console()).print(timeline_table(parts, 1, "steps [/b]"))
    said = capsys.readouterr().out
    wanted = ("run[lr=1e-4]: [red]set[/red]", " acc[top1] ", " len[/word] ", "steps [/b]", "in parallel: rewards/acc[")
    for text in wanted:
        assert text in said


def test_a_run_in_a_folder_with_brackets(tmp_path, capsys):
    """output_dir="run[lr=1e-4]", a reward called len[/word], a prompt that looks like markup, twice."""

    def measured(prompts, videos, **columns):
        return brightness(prompts, videos)

    measured.__name__ = "len[/word]"
    data = Dataset.from_dict({"prompt": ["a [/b] cat", "a dog\r# heading"]})
    for _ in range(2):
        made = trainer(tmp_path / "run[lr=1e-4]", measured, eval_dataset={"new [x]": data}, max_steps=1)
        made.train()
    made.save_model()
    said = capsys.readouterr().out.replace("\n", "")
    assert "run[lr=1e-4]/earlier-1." in said and "saved adapter to " in said and "rewards/len[/word]" in said
    assert "step 0 -> 1: new [x]" in said
    body = (tmp_path / "run[lr=1e-4]" / "README.md").read_text(encoding="utf-8")
    assert r"a \[/b\] cat" in body and r"a dog \# heading" in body


LOCALE = """
import sys
sys.path[:0] = [{tests!r}]
from trainers.tiny_runs import *

def bright(prompts, videos, **columns):
    return brightness(prompts, videos)

bright.__name__ = "亮度"
data = Dataset.from_dict({{"prompt": ["一只猫在弹钢琴", "ein Bär"]}})
made = trainer({folder!r}, bright, data, eval_dataset=data, max_steps=1, pipeline_kwargs={{"negative_prompt": "模糊",
               "max_sequence_length": 16}})
made.train()
made.save_model()
"""


@pytest.mark.slow
def test_a_chinese_prompt_where_the_locale_is_not_utf8(tmp_path):
    """LC_ALL=C: the run ends, the model is saved, and the card is UTF-8."""
    script = tmp_path / "train.py"
    code = LOCALE.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "run"))
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "一只猫在弹钢琴" in card and "negative_prompt='模糊'" in card and "rewards/亮度" in card
    assert "亮度" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
