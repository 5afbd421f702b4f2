"""Record in run_files.json which files of a folder its run wrote. All other files belong to the user."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .whole_files import write_json

LIST = "run_files.json"
README, OTHER_CARD = "README.md", "model_card.md"  # the second if README.md is the user's
CARD_MARK = "by reinforcement learning with pisces_rl"  # in all our cards; a README without it is the user's
ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
_KNOWN = re.compile(
    r"trace_rank[0-9]+\.json|evaluations/step_[0-9]{6,}\.json|samples/before_after_.*\.(png|captions\.txt)"
    r"|samples/(step|rollout|other)_[0-9]{6,}/(.*/)?([0-9]{3,}\.mp4|sheet\.(png|captions\.txt)|rewards\.json)"
)
_STEP = re.compile(r"(?:checkpoint-|evaluations/step_|samples/(?:step|rollout|other)_)([0-9]+)")


def listed(folder: str | os.PathLike) -> dict[str, bool] | None:
    """Return {relative path: whether it describes the run's current state} for the listed files that exist; None if
    the folder has no list."""
    folder, content = Path(folder), _read(Path(folder))
    if content is None:
        return None
    return {path: current for path, current in content["files"].items() if os.path.lexists(folder / path)}


def described(folder: str | os.PathLike) -> list[str] | None:
    """Return relative paths of the files that describe the run's current state; None if the folder has no list."""
    files = listed(folder)
    return None if files is None else [path for path, current in files.items() if current]


def add_listed(folder: str | os.PathLike, paths: Iterable[str]) -> None:
    """Add files to a folder's list, as describing the run's current state; do nothing if the folder has no list."""
    content = _read(Path(folder))
    if content is not None:
        _write(Path(folder), content["run"], content["files"] | dict.fromkeys(paths, True))


def own_checkpoints(folder: str | os.PathLike) -> dict[int, Path]:
    """Return {step: folder} of this package's checkpoints, in order: named checkpoint-STEP and holding policy.json."""
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name)
        if number and not path.is_symlink() and (path / "policy.json").is_file():
            found[int(number[1])] = path
    return dict(sorted(found.items()))


class RunFiles:
    """The files that a run writes into a folder, and those it finds there.

    `claim` lists a file before it is written; a file already in its place moves to `earlier-N`, unless this run wrote
    it. `begin` moves all files of an earlier run; `resume` takes them over. In a folder of an older version, which has
    no list, files are recognised by name and content. Only one process may use a folder.

    Args:
        folder: the run's folder.
        components: names of the pipeline's components; adapters may lie in subfolders of these names.
    """

    def __init__(self, folder: str | os.PathLike, components: Iterable[str] = ()):
        self.folder, self.components = Path(folder), tuple(components)
        self.run = uuid.uuid4().hex
        self._clear()

    def _clear(self) -> None:
        self.own: dict[str, bool] = {}  # path: whether it describes the run's current state
        self.begun, self.aside = False, None

    def begin(self) -> Path | None:
        """Begin a run: move an earlier run's files away and return the folder that holds them, or None.

        Files that this object wrote before its first run stay, and so does a README.md that the user wrote in place
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
        """Resume from the checkpoint at `step`: take over the folder's files; only those up to `step` are current."""
        content, on_disk = _read(self.folder), self._on_disk()
        self._clear()
        self.run, self.begun = self.run if content is None else content["run"], True
        for path in on_disk:
            of = _STEP.match(path)
            self.own[path] = of is not None and int(of[1]) <= step
        self._write()

    def claim(self, *paths: str) -> None:
        """List files before they are written; a file in their place that is not this run's moves to earlier-N."""
        self._leave_to_others()
        parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        blocked = [path for path in parents if self._exists(path) and not (self.folder / path).is_dir()]
        self._set_aside([*blocked, *(path for path in paths if path not in self.own)])
        self.add(*paths)

    def add(self, *paths: str) -> None:
        """List files that this run has written."""
        if not all(map(self.own.get, paths)):
            self.own |= dict.fromkeys(paths, True)
            self._write()

    def claim_adapter(self, paths: Iterable[str]) -> None:
        """`claim` an adapter's files, and move away other adapters that a loader would find."""
        paths = list(paths)
        self._set_aside([path for path in self._adapters() if path not in paths])
        self.claim(*paths)

    def claim_card(self) -> Path:
        """`claim` the model card and return its path: README.md, or model_card.md if README.md is the user's."""
        name = OTHER_CARD if self._exists(README) and not self._is_our_card() else README
        self.claim(name)
        if name == README and self.own.get(OTHER_CARD):  # the user has removed their README
            (self.folder / OTHER_CARD).unlink(missing_ok=True)
        return self.folder / name

    def current(self) -> list[str]:
        """Return the existing files that describe this run's current state."""
        self._leave_to_others()
        return [path for path, current in self.own.items() if current and self._exists(path)]

    def _exists(self, path: str) -> bool:
        return os.path.lexists(self.folder / path)

    def _leave_to_others(self) -> None:
        """Forget this run's files if another run has taken over the folder."""
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
            shutil.move(self.folder / path, self.aside / path)  # may be on another disk
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
        """Return the files that an older version, which kept no list, may have left."""
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
    """Return the list, without paths that leave the folder; None if it is missing or the file is not ours."""
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
