"""Which files of a folder its run wrote: run_files.json. Whatever is not listed there belongs to the user."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .whole_files import write_json

LIST = "run_files.json"
README, OTHER_CARD = "README.md", "model_card.md"  # the second where the user's own README is in the first's place
CARD_MARK = "by reinforcement learning with pisces_rl"  # a sentence of our cards; a README without it is the user's
ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
_KNOWN = re.compile(
    r"trace_rank[0-9]+\.json|evaluations/step_[0-9]{6,}\.json|samples/before_after_.*\.(png|captions\.txt)"
    r"|samples/(step|rollout|other)_[0-9]{6,}/(.*/)?([0-9]{3,}\.mp4|sheet\.(png|captions\.txt)|rewards\.json)"
)
_STEP = re.compile(r"(?:checkpoint-|evaluations/step_|samples/(?:step|rollout|other)_)([0-9]+)")


def listed(folder: str | os.PathLike) -> dict[str, bool] | None:
    """{relative path: whether it is of the present state of the folder's run} of the listed files that exist; None
    where the folder has no list."""
    folder, content = Path(folder), _read(Path(folder))
    if content is None:
        return None
    return {path: current for path, current in content["files"].items() if os.path.lexists(folder / path)}


def described(folder: str | os.PathLike) -> list[str] | None:
    """Files of the folder's present run, as relative paths; None where the folder has no list."""
    files = listed(folder)
    return None if files is None else [path for path, current in files.items() if current]


def add_listed(folder: str | os.PathLike, paths: Iterable[str]) -> None:
    """Add files to the list of a folder's run, as of its present state; does nothing where the folder has no list."""
    content = _read(Path(folder))
    if content is not None:
        _write(Path(folder), content["run"], content["files"] | dict.fromkeys(paths, True))


def own_checkpoints(folder: str | os.PathLike) -> dict[int, Path]:
    """{step: folder} of what this package saved, in order: exactly checkpoint-STEP, with a policy.json in it."""
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name)
        if number and not path.is_symlink() and (path / "policy.json").is_file():
            found[int(number[1])] = path
    return dict(sorted(found.items()))


class RunFiles:
    """The files that a run writes into a folder, and those it finds there.

    `claim` lists a file before it is written and moves what is in its place, unless this run wrote it, to
    `earlier-N`. `begin` moves all that an earlier run wrote; `resume` takes it over. A folder of an older version,
    without a list, is known by the names and contents of its files. One process of a folder uses it.

    Args:
        folder: of the run. components: names of the pipeline's components, for which subfolders of adapters are named.
    """

    def __init__(self, folder: str | os.PathLike, components: Iterable[str] = ()):
        self.folder, self.components = Path(folder), tuple(components)
        self.run = uuid.uuid4().hex
        self._clear()

    def _clear(self) -> None:
        self.own: dict[str, bool] = {}  # path: whether it is of the present state of the run
        self.begun, self.aside = False, None

    def begin(self) -> Path | None:
        """A run begins: move an earlier one's files away; returns where they are, None where there were none.

        What this object wrote before its first run stays, and so does a README.md that the user has put in the place
        of our card.
        """
        if self.begun:
            self._clear()
        self._leave_to_others()
        earlier = [
            path for path in self._on_disk() if path not in self.own and (path != README or self._is_our_card())
        ]
        aside = self._set_aside(earlier)
        self.begun = True
        if self.own or (self.folder / LIST).exists():
            self._write()
        return aside

    def resume(self, step: int) -> None:
        """A run goes on from its checkpoint of `step`: its files are this run's; later ones do not describe it."""
        content, on_disk = _read(self.folder), self._on_disk()
        self._clear()
        self.run, self.begun = self.run if content is None else content["run"], True
        for path in on_disk:
            of = _STEP.match(path)
            self.own[path] = of is not None and int(of[1]) <= step
        self._write()

    def claim(self, *paths: str) -> None:
        """List files that will be written; what is in their place and not this run's moves to earlier-N."""
        self._leave_to_others()
        parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        blocked = [path for path in parents if self._exists(path) and not (self.folder / path).is_dir()]
        self._set_aside([*blocked, *(path for path in paths if path not in self.own)])
        self.add(*paths)

    def add(self, *paths: str) -> None:
        """List what this run has written."""
        if not all(map(self.own.get, paths)):
            self.own |= dict.fromkeys(paths, True)
            self._write()

    def claim_adapter(self, paths: Iterable[str]) -> None:
        """`claim`, and move away other adapters at the places where loaders look for one."""
        paths = list(paths)
        self._set_aside([path for path in self._adapters() if path not in paths])
        self.claim(*paths)

    def claim_card(self) -> Path:
        """`claim` for the model card: README.md, or model_card.md where README.md is the user's own."""
        name = OTHER_CARD if self._exists(README) and not self._is_our_card() else README
        self.claim(name)
        if name == README and self.own.get(OTHER_CARD):  # the user has removed that README
            (self.folder / OTHER_CARD).unlink(missing_ok=True)
        return self.folder / name

    def current(self) -> list[str]:
        """Files that describe the present state of this run, and exist."""
        self._leave_to_others()
        return [path for path, current in self.own.items() if current and self._exists(path)]

    def _exists(self, path: str) -> bool:
        return os.path.lexists(self.folder / path)

    def _leave_to_others(self) -> None:
        """Where another run has taken the folder over, nothing in it is this run's any more."""
        content = _read(self.folder)
        if self.own and content is not None and content["run"] != self.run:
            self._clear()

    def _on_disk(self) -> dict[str, bool]:
        files = listed(self.folder)
        if files is None:
            return {path: True for path in self._known_names() if self._exists(path)}
        return files

    def _write(self) -> None:
        others = {} if self.begun else {path: False for path in self._on_disk() if path not in self.own}
        _write(self.folder, self.run, others | self.own)

    def _set_aside(self, paths: list[str]) -> Path | None:
        found = [path for path in dict.fromkeys(paths) if self._exists(path)]
        if not found:
            return None
        if self.aside is None or any(os.path.lexists(self.aside / path) for path in found):
            taken = [int(p.name[8:]) for p in self.folder.glob("earlier-*") if re.fullmatch("earlier-[0-9]+", p.name)]
            self.aside = self.folder / f"earlier-{max(taken, default=0) + 1}"
            self.aside.mkdir()
        on_disk, moved = self._on_disk(), _read(self.aside) or {"run": self.run, "files": {}}
        for path in found:
            (self.aside / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.folder / path, self.aside / path)  # which may lie on another disk
            if path in on_disk:
                moved["files"][path] = on_disk[path]
            for parent in [self.folder / parent for parent in list(PurePosixPath(path).parents)[:-1]]:
                if not parent.is_symlink() and not any(parent.iterdir()):
                    parent.rmdir()
        _write(self.aside, moved["run"], moved["files"])
        return self.aside

    def _is_our_card(self) -> bool:
        path = self.folder / README
        return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")

    def _adapters(self) -> list[str]:
        places = ("", *(f"{name}/" for name in self.components))
        names = [f"{place}{name}" for place in places for name in ADAPTERS if place or name == ADAPTERS[0]]
        return [name for name in names if self._exists(name)]

    def _known_names(self) -> list[str]:
        """What a version that kept no list has left."""
        folder = self.folder
        known = [path.name for path in own_checkpoints(folder).values()]
        known += [README, *self._adapters()] if self._is_our_card() else []  # saved together
        known += ["report.json", "report.md"] if _is_our_report(folder / "report.json") else []
        paths = [p for place in ("*", "evaluations/*", "samples/**/*") for p in folder.glob(place) if p.is_file()]
        known += [path for path in (p.relative_to(folder).as_posix() for p in paths) if _KNOWN.fullmatch(path)]
        if known:  # otherwise the event files are another program's
            known += [p.relative_to(folder).as_posix() for p in folder.glob("runs/*/events.out.tfevents.*")]
        return known


def _is_our_report(path: Path) -> bool:
    try:
        return {"from_step", "to_step", "comparison"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _read(folder: Path) -> dict | None:
    """The list, without entries that lead out of the folder; None where there is none, or another file of its name."""
    try:
        content = json.loads((folder / LIST).read_text(encoding="utf-8"))
        files = {
            path: bool(current)
            for path, current in content["files"].items()
            if not {"..", "/"} & {*PurePosixPath(path).parts} and PurePosixPath(path).parts
        }
        return {"run": content["run"], "files": files}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(folder: Path, run: str, files: dict[str, bool]) -> None:
    write_json(folder / LIST, {"run": run, "files": files}, indent=0)
