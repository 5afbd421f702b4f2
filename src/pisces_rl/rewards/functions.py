"""Load functions from files and modules by name: file.py:function or package.module:function."""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType


def load_function(name: str, known: Sequence[str] = ()) -> Callable:
    """Load the function file.py:function or package.module:function.

    Args:
        name: the function.
        known: other names that the caller accepts, for the error message.

    Raises:
        ValueError: there is no such file, module or function; the message lists what there is. Exceptions of the file
            itself pass through, with their file and line.
    """
    location, _, attribute = name.rpartition(":")
    if name.endswith(".py"):  # any colon belongs to the path
        location, attribute = name, ""
    if location.endswith(".py"):
        module = _module_of_file(name, Path(location).expanduser())
    elif re.fullmatch(r"\w+(\.\w+)*", location):
        try:
            module = importlib.import_module(location)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{location}.".startswith(f"{error.name}."):
                raise  # the module itself imports something that is missing
            raise ValueError(
                f"reward {name!r}: there is no module {error.name!r}; is it installed, or on PYTHONPATH?"
            ) from error
    else:
        near = difflib.get_close_matches(name, known, n=3)
        advice = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise ValueError(
            f"reward {name!r} is unknown{advice} Known: {', '.join(known)}; name a custom one file.py:function or "
            "package.module:function."
        )
    if not attribute or not callable(getattr(module, attribute, None)):
        there = ", ".join(sorted(n for n, value in vars(module).items() if _is_function(n, value, module.__name__)))
        asked = f"{location} has no function {attribute!r}" if attribute else f"name a function, {location}:FUNCTION"
        near = difflib.get_close_matches(attribute, there.split(", "), n=1)
        advice = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"reward {name!r}: {asked}{advice} Available: {there or 'none'}.")
    return getattr(module, attribute)


def _is_function(name: str, value: object, module: str) -> bool:
    """Return whether it is a public function, or another callable but not a class, of the module's package."""
    if name.startswith("_") or not callable(value) or inspect.isclass(value):
        return False
    own = value.__module__ if inspect.isfunction(value) else type(value).__module__
    return isinstance(value, functools.partial) or (own or "").split(".")[0] == module.split(".")[0]


def _module_of_file(name: str, path: Path) -> ModuleType:
    """Load a file as a module, once per content. It is registered in sys.modules, where dataclasses and pickle look it
    up, under a name that differs for files with the same stem. The file's folder, and the folder of the file it links
    to, are appended to sys.path for its imports."""
    if not path.is_file():
        raise ValueError(f"reward {name!r}: no file {str(path)!r}.")
    path = path.parent.resolve() / path.name  # files in the Hub's cache link to blobs without a suffix
    folders = list(dict.fromkeys((path.parent, path.resolve().parent)))
    content = path.read_bytes()
    digest = hashlib.sha256(str(path).encode() + content).hexdigest()[:12]
    own = re.sub(r"\W", "_", path.stem) + f"_{digest}"
    if own in sys.modules:
        return sys.modules[own]
    sys.path += [str(folder) for folder in folders if str(folder) not in sys.path]
    importlib.invalidate_caches()  # neighbouring files may be newer than the import caches
    _check_neighbours(name, path, folders, content)
    loader = _SourceLoader(own, str(path))
    spec = importlib.util.spec_from_file_location(own, path, loader=loader)
    module = sys.modules[own] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # a loader is given
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


class _SourceLoader(SourceFileLoader):
    """A loader without bytecode, which would count as current after an edit within a second at equal size."""

    def get_code(self, fullname: str) -> CodeType | None:
        return self.source_to_code(self.get_data(self.path), self.path)


def _check_neighbours(name: str, path: Path, folders: list[Path], content: bytes) -> None:
    """Raise a ValueError if the file imports a module that is next to it, but Python would find another one."""
    tree = ast.parse(content, filename=str(path))
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for top in {module.split(".")[0] for module in imported}:
            beside = [p for folder in folders for p in (folder / f"{top}.py", folder / top / "__init__.py")]
            beside = [p for p in beside if p.is_file()]
            if not beside or top in sys.builtin_module_names:
                continue
            if (taken := _file_of(top)) not in [str(p.resolve()) for p in beside]:
                raise ValueError(
                    f"reward {name!r}: it imports {top!r}, which is next to it as {beside[0]}, but Python would "
                    f"import {taken}; rename the one next to it."
                )


def _file_of(module: str) -> str | None:
    if module in sys.modules:
        found = getattr(sys.modules[module], "__file__", None)
    else:
        spec = importlib.util.find_spec(module)
        found = None if spec is None else spec.origin
    return None if found is None else str(Path(found).resolve())
