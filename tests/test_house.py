"""The rules of the house: who may import whom, what files may be called, what must not be in them."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pisces_rl"

#: For each part, the parts of pisces_rl that it may import besides itself. A part that is not named is a failure.
MAY_IMPORT = {
    "ot": set(),
    "transitions": set(),
    "assets": set(),
    "whole_files": set(),
    "media": {"whole_files"},
    "markdown": set(),
    "run_files": {"whole_files"},
    "hub": {"markdown", "run_files"},
    "run_page": {"run_files", "whole_files"},
    "shapemotion": set(),
    "policy": {"transitions"},
    "rewards": {"ot", "assets", "media", "whole_files"},
    "trainers": {
        "estimate",
        "policy",
        "rewards",
        "transitions",
        "assets",
        "media",
        "hub",
        "markdown",
        "run_files",
        "run_page",
        "whole_files",
    },
    "estimate": {"policy", "assets"},
    "export": {"policy", "hub", "run_files", "whole_files"},
    "evaluation": {
        "policy",
        "rewards",
        "transitions",
        "trainers",
        "ot",
        "assets",
        "media",
        "shapemotion",
        "markdown",
        "run_files",
        "whole_files",
    },
    "prompt_files": set(),
    "cli": {
        "command",
        "prompt_files",
        "policy",
        "rewards",
        "transitions",
        "trainers",
        "ot",
        "assets",
        "media",
        "hub",
        "evaluation",
        "estimate",
        "export",
        "shapemotion",
        "markdown",
        "whole_files",
    },
    "command": {"cli", "rewards", "evaluation", "run_page"},
    "__main__": {"command"},
    # names of the top level are loaded on first use, so importing it costs nothing
    "__init__": {"policy", "rewards", "transitions", "trainers", "export", "assets", "media", "hub"},
}


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of all modules that a source file imports, at any depth, relative ones resolved."""
    package = ["pisces_rl", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def parts_imported(path: Path) -> set[str]:
    """The parts of pisces_rl (`policy`, `media`, ...) that a file imports; `pisces_rl` itself for the bare package."""
    names = {name for name in imported_modules(path) if name.split(".")[0] == "pisces_rl"}
    return {name.split(".")[1] for name in names if "." in name} & set(MAY_IMPORT)


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; the whole tree if there is no repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = {".venv", "outputs", ".git", "__pycache__", ".pytest_cache", ".ruff_cache"}
        files = [p for p in ROOT.rglob("*") if not hidden & set(p.relative_to(ROOT).parts)]
    return [path for path in files if path.is_file()]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_rules(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is a new part of the package: say in MAY_IMPORT what it may import"
    forbidden = parts_imported(path) - MAY_IMPORT[part] - {part}
    assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}; {part} may import {MAY_IMPORT[part]}"


def test_import_rules_notice_a_breach(tmp_path, monkeypatch):
    """The reader of imports sees each way of writing one."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "ot").mkdir()
    for line in (
        "from ..policy import VideoPolicy",
        "from .. import policy",
        "import pisces_rl.policy.lora.adapters",
        "from pisces_rl import policy",
        "def f():\n    from pisces_rl.policy.lora.adapters import save_lora",
    ):
        (tmp_path / "ot" / "a.py").write_text(line)
        assert parts_imported(tmp_path / "ot" / "a.py") == {"policy"}, line


def test_trl_is_imported_in_one_module_only():
    """TRL's classes come from trainers/base/_trl.py, so that a new TRL is met in one place."""
    users = [p for p in sources() if any(m.split(".")[0] == "trl" for m in imported_modules(p))]
    assert [p.relative_to(PACKAGE).as_posix() for p in users] == ["trainers/base/_trl.py"]


def test_the_server_extra_is_imported_only_by_the_server():
    """`application` is imported by `serve` within the function that looks for the extra."""
    users = {p.name for p in sources() if {"starlette", "uvicorn"} & {m.split(".")[0] for m in imported_modules(p)}}
    server = PACKAGE / "rewards" / "server"
    at_import = [
        ast.unparse(node)
        for path in sources()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and path != server / "application.py"
    ]
    assert users == {"application.py", "serve.py"}
    assert not [line for line in at_import if re.search(r"starlette|uvicorn|[. ]application\b", line)]


def test_only_commands_evaluation_and_tests_import_shapemotion():
    """Rewards and trainers must not know the embedded world."""
    users = {part_of(p) for p in sources() if "shapemotion" in parts_imported(p)}
    assert users <= {"shapemotion", "evaluation", "cli"}


def opened_without_encoding(path: Path) -> list[int]:
    """Lines of a source file that read or write text in the encoding of the user's locale."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [
            a.value
            for a in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
            if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        mode = next((text for text in texts if re.fullmatch(r"[rwaxbt+]{1,3}", text)), None)
        opens = ast.unparse(node.func) == "open" or (name == "open" and mode is not None)
        temporary = name in ("NamedTemporaryFile", "TemporaryFile", "fdopen") and mode is not None
        if ast.unparse(node.func) == "av.open":
            continue
        if name in ("read_text", "write_text") or ((opens or temporary) and "b" not in (mode or "r")):
            lines.append(node.lineno)
    return sorted(lines)


def programs() -> list[Path]:
    return [p for folder in ("src", "examples", "benchmarks", "assets_src") for p in (ROOT / folder).rglob("*.py")]


def test_text_files_are_utf8_in_every_locale():
    """A prompt in Chinese under LC_ALL=C lost a model when the card was written."""
    found = [f"{path.relative_to(ROOT)}:{line}" for path in programs() for line in opened_without_encoding(path)]
    assert not found, f'pass encoding="utf-8": {found}'


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("path.read_text()", True),
        ("path.write_text('x')", True),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("path.open()", False),
        ("path.open('a')", True),
        ("open(path, mode='r')", True),
        ("os.fdopen(1, 'w')", True),
        ("open(path, 'rb')", False),
        ("path.open('wb')", False),
        ("open(path, encoding='utf-8')", False),
        ("av.open(path, 'w')", False),
        ("path.read_text(encoding='utf-8', errors='replace')", False),
        ("NamedTemporaryFile('w')", True),
        ("NamedTemporaryFile()", False),
    ],
)
def test_the_rule_on_encodings_notices_a_breach(tmp_path, line, wrong):
    (tmp_path / "a.py").write_text(line)
    assert opened_without_encoding(tmp_path / "a.py") == ([1] if wrong else [])


def test_no_file_is_called_utils():
    assert not [p for p in tracked_files() if re.fullmatch(r"utils?|helpers?|misc|common", p.stem)]


def test_no_path_of_a_machine_and_no_registry_host():
    """What is committed says nothing of the machine it was written on."""
    folders = (("work", "main"), ("work", "shared"), ("home",), ("opt", "pypi"), ("root",))
    needles = ["/".join(["", *parts, ""]) for parts in folders]
    needles += ["." + "library/", "files.python" + "hosted", "pypi" + ".org", "--extra-" + "index-url"]
    found = []
    for path in tracked_files():
        if path.suffix in {".safetensors", ".png", ".mp4", ".gif"}:
            continue
        text = path.read_text(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {needle}" for needle in needles if needle in text]
    assert not found


def test_files_stay_small_enough_to_ship():
    large = [p for p in tracked_files() if p.stat().st_size >= 16 * 2**20]
    assert not large


def recipes() -> list[Path]:
    return sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("recipes/**/*.yml")])


@pytest.mark.parametrize("path", recipes(), ids=lambda p: p.name)
def test_recipe_parses(path):
    settings = yaml.safe_load(path.read_text())
    assert isinstance(settings, dict) and settings
    assert all(isinstance(key, str) for key in settings)


def test_build_backend_only_in_pyproject():
    """Tool settings live in setup.cfg and ruff.toml."""
    headings = re.findall(r"^\[([^\]]+)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert headings == ["build-system"]


def test_license_and_constraints():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
            assert "+" not in version, f"{line}: a local version is on no public index"
            assert not name.lower().startswith(("nvidia", "cuda", "triton"))
    text = (ROOT / "setup.cfg").read_text()
    wanted = re.findall(r"^    ([A-Za-z0-9_.-]+)>=([0-9.]+)", text, re.M)
    assert len(wanted) > 15
    for name, bound in wanted:
        pinned = pins[re.sub(r"[-_.]+", "-", name).lower()]
        assert numbers(pinned) >= numbers(bound), f"{name}: tested with {pinned}, below its bound {bound}"


def numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


def test_ci_runs_what_the_readme_says():
    commands = [
        line.strip()
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line.strip() and not line.startswith(("#", "set ", "cd "))
    ]
    readme = (ROOT / "README.md").read_text()
    assert commands and all(command in readme for command in commands)


def pages() -> list[str]:
    found = sorted({p for pattern in ("docs/**/*.md", "src/**/*.md") for p in ROOT.glob(pattern)})
    return ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(p.relative_to(ROOT).as_posix() for p in found)]


@pytest.mark.parametrize("page", pages())
def test_pages_mention_only_files_that_exist(page):
    """Paths in backticks and relative links. `outputs/` holds what a run writes, so it is skipped."""
    text = (ROOT / page).read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "outputs"}
    mentioned = {m for m in re.findall(r"`([\w./-]+)`", prose) if "/" in m and m.split("/")[0] in folders}
    mentioned |= set(re.findall(r"(?:^|[\s\"'(])((?:examples|recipes|benchmarks|assets_src)/[\w./-]+\.\w+)", text))
    missing = [m for m in sorted(mentioned) if not (ROOT / m).exists()]
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    missing += [link for link in links if link and not ((ROOT / page).parent / link).exists()]
    assert not missing, f"{page} mentions files that do not exist: {missing}"


def test_no_two_files_have_one_name():
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("room", ["trainers/rollouts", "trainers/base"])
def test_shared_code_does_not_depend_on_a_method(room):
    methods = ("pisces_rl.trainers.grpo", "pisces_rl.trainers.forward", "pisces_rl.trainers.backprop")
    paths = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    assert paths and not [
        (path.name, name) for path in paths for name in imported_modules(path) if name.startswith(methods)
    ]


def test_each_page_is_in_the_navigation_of_the_site():
    """docs/README.md is GitHub's index of the pages; what is generated lies outside docs/ (docs/site_links.py)."""

    def leaves(node):
        return (
            [node]
            if isinstance(node, str)
            else [p for part in (node.values() if isinstance(node, dict) else node) for p in leaves(part)]
        )

    text = re.sub(r"!ENV .*", '""', (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = leaves(yaml.safe_load(text)["nav"])
    written = {p.relative_to(ROOT / "docs").as_posix() for p in ROOT.glob("docs/**/*.md")} - {"README.md"}
    assert sorted(listed) == sorted(written | {"index.md", "contributing.md", "changelog.md"})


def test_troubleshooting_quotes_messages_that_exist():
    """Code in a symptom is text of the sources, `...` standing for a value; entries have a cause and a fix each."""
    literals = [
        " ".join(node.value.split())
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    entries = page.split("\n### ")[1:]
    assert len(entries) >= 20
    for entry in entries:
        title = entry.splitlines()[0]
        parts = re.fullmatch(r".*\*\*Symptom\.\*\* (.*)\*\*Cause\.\*\* .*\*\*Fix\.\*\* .*", entry, re.S)
        assert parts, title
        for quoted in re.findall(r"`([^`]+)`", parts[1]):
            if " " not in quoted or quoted.startswith("python "):
                continue
            for piece in filter(None, " ".join(quoted.split()).split(" ... ")):
                assert any(piece in literal for literal in literals), f"{title}: no message holds {piece!r}"


@pytest.mark.parametrize(
    "module", ["", ".rewards", ".ot", ".ot.maps", ".transitions", ".export", ".estimate", ".evaluation", ".trainers"]
)
def test_the_reference_has_every_public_class_and_function(module):
    """Not of `policy`, which also exports what only other parts of the package use."""
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: pisces_rl[\w.]*\.(\w+)$", pages, re.M))
    public = importlib.import_module(f"pisces_rl{module}").__all__
    missing = [name for name in public if name not in shown and not name.isupper()]
    assert not missing, f"docs/reference/ lacks {missing}"
