"""Read a run's folder as plain JSON for its page. Needs no trainer, and also reads runs that are still in progress."""

import json
import math
import os
import re
from pathlib import Path

from ..run_files import LIST, listed, own_checkpoints

#: The trainer writes this file next to its page: {"trainer", "model", "fps", "settings", "given": settings that differ
#: from their defaults, "state": {"global_step", "max_steps", "log_history"}}.
RUN_FILE = "run.json"
PAGE_FILE = "report.html"
MOST_POINTS = 1_500  # per curve
MOST_EVALUATIONS = 40  # with scores per prompt in the page; the others have only means
APART = ("evaluation", "saving")  # parts of the timeline outside the steps
_KNOWN = ("README.md", "model_card.md", "report.json", "report.md", "pytorch_lora_weights.safetensors")


def read_run(folder: str | os.PathLike) -> dict:
    """Read a run's folder as JSON with finite numbers; unreadable files are skipped and listed in "notes".

    Returns:
        {"name", "trainer", "model", "step", "max_steps", "fps", "settings": {name: text},
        "given": names of settings or None, "curves": {name: [[step, value], ...]},
        "time": {"steps", "parts": {name: seconds}} or None,
        "prompts": [lists of prompts], "evaluations": [{"step", "sets": {set: {"prompts": index of a list,
        "scores": {score: values or None}, "means": {score: mean}, "videos": [path or None, ...]}}}],
        "comparison": report.json or None, "correlations": {"step", "sets": {set: {"scores", "values", "n"}}} or None,
        "files": [[path, bytes or None], ...], "notes": [text, ...]}; paths are relative to the folder.

    Raises:
        ValueError: the folder does not exist, or is not a run's folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give a run's output_dir.")
    notes: list[str] = []
    about, present = _about(folder, notes), listed(folder) or {}
    evaluations, prompts = _evaluations(folder, present, notes)
    comparison = _json(folder, "report.json", notes, "comparison") if present.get("report.json", True) else None
    if not (about or evaluations or comparison or (folder / LIST).is_file()):
        raise ValueError(
            f"{str(folder)!r} is not a run's folder: it has no {LIST}, {RUN_FILE}, evaluations/, "
            "samples/step_* or checkpoint-*. Give a run's output_dir."
        )
    state = _dict(about.get("state"))
    history = [row for row in _list(state.get("log_history")) if isinstance(row, dict)]
    curves = _curves(history)
    steps = [_number(step) for step in (state.get("global_step"), *(e["step"] for e in evaluations))]
    correlations = _correlations(evaluations[-1]) if evaluations else None
    _thin(evaluations)
    return {
        "name": folder.resolve().name,
        "trainer": _text(about.get("trainer")),
        "model": _text(about.get("model")),
        "step": max((step for step in steps if step is not None), default=None),
        "max_steps": _number(state.get("max_steps")),
        "fps": _number(about.get("fps")),
        "settings": {str(key): _text(value) for key, value in _dict(about.get("settings")).items()},
        "given": [_text(name) for name in about["given"]] if isinstance(about.get("given"), list) else None,
        "curves": {name: _fewer(points) for name, points in curves.items()},
        "time": _time(history),
        "prompts": prompts,
        "evaluations": evaluations,
        "comparison": _plain(comparison),
        "correlations": correlations,
        "files": _files(folder),
        "notes": notes,
    }


def correlation(a: list, b: list) -> float | None:
    """Return Pearson's r over pairs without None; None for fewer than 3 pairs or if one side is constant."""
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    if len(pairs) < 3:
        return None
    means = [math.fsum(column) / len(pairs) for column in zip(*pairs)]
    x, y = ([value - mean for value in column] for column, mean in zip(zip(*pairs), means))
    norm = math.sqrt(math.fsum(v * v for v in x) * math.fsum(v * v for v in y))
    return None if norm < 1e-12 else max(-1.0, min(1.0, math.fsum(v * w for v, w in zip(x, y)) / norm))


def _about(folder: Path, notes: list[str]) -> dict:
    """Return run.json or, if the folder has none, the equivalent from its last checkpoint."""
    about = _json(folder, RUN_FILE, notes, "state")
    if about is not None:
        return about
    for checkpoint in reversed(own_checkpoints(folder).values()):
        state = _json(folder, f"{checkpoint.name}/trainer_state.json", notes, "log_history")
        policy = _json(folder, f"{checkpoint.name}/policy.json", notes)
        if state is not None and policy is not None:
            notes.append(f"Curves and settings are from {checkpoint.name}: the folder has no {RUN_FILE}.")
            settings = _dict(policy.get("settings")) | _dict(policy.get("objective"))
            return {name: policy.get(name) for name in ("trainer", "model")} | {"settings": settings, "state": state}
    return {}


def _evaluations(folder: Path, present: dict[str, bool], notes: list[str]) -> tuple[list[dict], list[list[str]]]:
    """Return evaluations sorted by step, and the lists of prompts they share. A step that has only samples becomes an
    evaluation of these samples. Files that the run's file list marks as outdated are skipped."""
    found: dict[int, dict] = {}

    def paths(pattern: str) -> list[Path]:
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))}
        return [path for name, path in found.items() if present.get(name, True)]

    for path in paths("evaluations/step_*.json"):
        content = _json(folder, path.relative_to(folder).as_posix(), notes, "sets")
        if content is not None and isinstance(content.get("step"), int):
            found[content["step"]] = _dict(content["sets"])
    sampled: dict[int, dict] = {}
    for path in paths("samples/step_*/**/rewards.json"):
        place = path.relative_to(folder / "samples").parts
        step = re.fullmatch(r"step_([0-9]+)", place[0])
        if step and int(step[1]) not in found:
            content = _json(folder, path.relative_to(folder).as_posix(), notes, "scores")
            sampled.setdefault(int(step[1]), {})["/".join(place[1:-1])] = content
    lists: list[list[str]] = []
    evaluations = []
    for step, sets in sorted((found | sampled).items()):
        read = {name: _scored(folder, step, name, part, lists) for name, part in sets.items() if _is_scored(part)}
        if read:
            evaluations.append({"step": step, "sets": read})
    return evaluations, lists


def _is_scored(part) -> bool:
    return isinstance(part, dict) and isinstance(part.get("prompts"), list) and isinstance(part.get("scores"), dict)


def _scored(folder: Path, step: int, name: str, part: dict, lists: list[list[str]]) -> dict:
    prompts = [_text(prompt) for prompt in part["prompts"]]
    if prompts not in lists:
        lists.append(prompts)
    scores = {
        str(score): [_number(value) for value in values[: len(prompts)]]
        for score, values in part["scores"].items()
        if isinstance(values, list)
    }
    place, videos = f"samples/step_{step:06d}/{name}", []
    shown = _json(folder, f"{place}/rewards.json", [], "prompts") if _within(folder, place) else None
    for row, prompt in enumerate(_list((shown or {}).get("prompts"))[: len(prompts)]):
        path = f"{place}/{row:03d}.mp4"
        videos.append(path if _text(prompt) == prompts[row] and (folder / path).is_file() else None)
    known = {score: [value for value in values if value is not None] for score, values in scores.items()}
    means = {score: _short(math.fsum(values) / len(values)) for score, values in known.items() if values}
    return {"prompts": lists.index(prompts), "scores": scores, "means": means, "videos": videos}


def _thin(evaluations: list[dict]) -> None:
    """Keep the scores of MOST_EVALUATIONS evenly spread evaluations; keep only the means of the others."""
    last = len(evaluations) - 1
    kept = {round(i * last / (MOST_EVALUATIONS - 1)) for i in range(MOST_EVALUATIONS)}
    for index, evaluation in enumerate(evaluations):
        for part in evaluation["sets"].values():
            if last >= MOST_EVALUATIONS and index not in kept:
                part["scores"] = part["videos"] = None


def _curves(history: list[dict]) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {}
    for row in history:
        step = _number(row.get("step"))
        for name, value in row.items() if step is not None else ():
            if name not in ("step", "epoch") and _number(value) is not None:
                curves.setdefault(str(name), []).append([step, _number(value)])
    return curves


def _fewer(points: list) -> list:
    stride = -(-len(points) // MOST_POINTS)
    return points[::-stride][::-1] if stride > 1 else points


def _time(history: list[dict]) -> dict | None:
    """Sum the seconds of each part, which `Timeline.read` logs as seconds/PART, over the log."""
    parts: dict[str, float] = {}
    steps = 0
    for row in history:
        for name, value in row.items():
            if str(name).startswith("seconds/") and _number(value) is not None:
                part = name.removeprefix("seconds/")
                parts[part] = parts.get(part, 0.0) + _number(value)
                steps = max(steps, _number(row.get("step")) or 0)
    return {"steps": steps, "parts": {name: _short(value) for name, value in parts.items()}} if steps else None


def _correlations(evaluation: dict) -> dict:
    """Return r between every two rewards and judges over the prompts of each set."""
    sets = {}
    for name, part in evaluation["sets"].items():
        scores = [score for score in part["scores"] if score.startswith(("rewards/", "judges/"))]
        values = [[correlation(part["scores"][a], part["scores"][b]) for b in scores] for a in scores]
        if len(scores) > 1:
            rows = max(len(part["scores"][score]) for score in scores)
            sets[name] = {"scores": scores, "values": [[_short(r) for r in row] for row in values], "n": rows}
    return {"step": evaluation["step"], "sets": sets}


def _files(folder: Path) -> list[list]:
    """Return [path, bytes] of the current run's files except the page; bytes is None for folders."""
    paths = listed(folder)
    if paths is None:
        patterns = ("evaluations/step_*.json", "samples/**/*.*", "checkpoint-*", "runs/*/events.out.tfevents.*")
        paths = dict.fromkeys(p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern))
        paths = {name: True for name in (*_KNOWN, *paths) if (folder / name).exists()}
    files = []
    for path, current in sorted(paths.items()):
        if current and path != PAGE_FILE and _within(folder, path):
            try:
                files.append([path, None if (folder / path).is_dir() else (folder / path).stat().st_size])
            except OSError:  # removed meanwhile
                continue
    return files


def _json(folder: Path, path: str, notes: list[str], *keys: str) -> dict | None:
    """Return a file's object if it has these keys; None if there is no file or, with a note, no such object."""
    try:
        content = json.loads((folder / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        notes.append(f"{path} could not be read: it is incomplete or not JSON.")
        return None
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        notes.append(f"{path} is not a run's file: it lacks {', '.join(keys) or 'an object'}.")
        return None
    return content


def _within(folder: Path, path: str) -> bool:
    """Return whether a path stays in the folder; a set's name is user input and could be "../x"."""
    return (folder / path).resolve().is_relative_to(folder.resolve())


def _number(value) -> float | int | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and abs(value) > 2**53:  # JavaScript numbers cannot represent it
        return None
    return _short(value) if isinstance(value, (int, float)) else None


def _short(value: float | None) -> float | int | None:
    """Round to six digits, which is enough for a page; return None for values that are not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _plain(content):
    """Replace non-finite numbers in JSON by None."""
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    return _number(content) if isinstance(content, float) else content


def _text(value) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False)


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value) -> list:
    return value if isinstance(value, list) else []
