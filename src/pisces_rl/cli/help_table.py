"""The options of commands whose settings are dataclasses, as a table: --help needs neither torch nor TRL.

`python -m pisces_rl.cli.help_table` writes help_table.json from the real parsers: each distinct option once, and the
names of each command's options, per method. Run it after a change to a setting.
"""

import argparse
import copy
import functools
import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
INHERITED = ("transformers", "trl")  # the packages that define the inherited settings
INHERITED_TITLE = "options inherited from transformers.TrainingArguments"
SECTION = "|"  # in a command's list of options: the inherited ones follow
STYLE = {
    "usage": "%(prog)s [--config FILE] [OPTIONS]",  # not hundreds of options before each error
    "allow_abbrev": False,  # do not train with a typo
}
#: What the help of an option depends on.
_SHOWN = ("option_strings", "dest", "nargs", "choices", "required", "metavar", "help", "default")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show each option once: HfArgumentParser also accepts --learning-rate for --learning_rate."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        others = {name for name in action.option_strings if "_" in name}
        shown.option_strings = [
            name for name in action.option_strings if name in others or f"--{name[2:].replace('-', '_')}" not in others
        ]
        return super()._format_action_invocation(shown)


class _ListedOption(argparse.Action):
    """An option that help shows and whose value is ignored."""

    def __call__(self, *_: object) -> None:
        pass


def list_options(
    parser: argparse.ArgumentParser, own: Sequence[argparse.Action], inherited: Sequence[argparse.Action]
) -> None:
    """Make help list a parser's own options first, then the inherited ones in a group."""
    parser._optionals._group_actions[:] = own
    if inherited:
        parser.add_argument_group(INHERITED_TITLE)._group_actions += inherited


@functools.cache
def _table() -> dict[str, dict]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def methods(command: str) -> list[str]:
    """Return the values of a command's --method; an empty list if it has no methods."""
    return [key.split()[1] for key in _table()["commands"] if key.startswith(f"{command} ")]


def methods_with(option: str) -> list[str]:
    """Return the methods of `pisces-rl train` that have a setting."""
    listed = {name: _table()["commands"][f"train {name}"].split() for name in methods("train")}
    return [name for name, options in listed.items() if option in {key.partition("@")[0] for key in options}]


def listed_parser(command: str, method: str | None = None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the help of a command's real parser. Use it only to print that help: it converts no value.

    Args:
        command: a command whose settings are dataclasses.
        method: one of `methods(command)`; None if it has no methods.
        prog: the program's name.
    """
    table = _table()
    # The table serves every version of transformers and TRL. Real parsers would take 10 s for each user of a newer
    # version, although few inherited settings change (1 of 114 from transformers 5.23 to 5.24); so tell the user.
    other = [
        f"{name} {made_with} (installed: {found})"
        for name, made_with in table["versions"].items()
        if method and (found := installed(name)) != made_with  # only methods inherit settings
    ]
    epilog = f"Inherited settings are those of {' and '.join(other)}; a few may differ." if other else None
    parser = argparse.ArgumentParser(prog=prog, formatter_class=HelpFormatter, epilog=epilog, **STYLE)
    sections = table["commands"][f"{command} {method}" if method else command].split(SECTION)
    listed = [[parser._add_action(_ListedOption(**table["options"][name])) for name in x.split()] for x in sections]
    list_options(parser, parser._optionals._group_actions[:1] + listed[0], listed[1] if listed[1:] else [])
    return parser


def installed(name: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def real_parsers() -> dict[str, Callable[[], argparse.ArgumentParser]]:
    """Return what makes each command's real parser, by "command" or "command method"."""
    from .arguments import settings_parser
    from .estimate_command import EstimateArguments
    from .evaluate_command import EvaluationArguments
    from .fit_map_command import FitArguments
    from .train_command import TRAINERS, MethodArguments

    types: dict[str, tuple[type, ...]] = {}
    for method, (_, config) in TRAINERS.items():
        types[f"train {method}"] = (MethodArguments, config)
        types[f"estimate {method}"] = (EstimateArguments, MethodArguments, config)
    types |= {"evaluate": (EvaluationArguments,), "fit-map": (FitArguments,)}
    return {key: functools.partial(settings_parser, *kinds) for key, kinds in types.items()}


def generate() -> str:
    """Return the text of the table, one option per line."""
    commands: dict[str, str] = {}
    options: dict[str, dict] = {}

    def name_of(action: argparse.Action, suffix: str) -> str:
        shown = {key: getattr(action, key) for key in _SHOWN}
        option = {key: value for key, value in shown.items() if value is not None and value is not False}
        if action.default is not None:
            option["default"] = str(action.default)  # as help shows it
        if action.choices is not None:
            option["choices"] = [str(choice) for choice in action.choices]
        plain = action.option_strings[0].removeprefix("--")
        known = [name for name in options if name.partition("@")[0] == plain]
        same = next((name for name in known if options[name] == option), f"{plain}@{suffix}" if known else plain)
        options[same] = option
        return same

    for key, make in real_parsers().items():
        sections = [group._group_actions for group in make()._action_groups if group._group_actions]
        names = [[name_of(a, key.replace(" ", "_")) for a in actions if a.dest != "help"] for actions in sections]
        commands[key] = f" {SECTION} ".join(" ".join(section) for section in names)
    parts = {"versions": {name: version(name) for name in INHERITED}, "commands": commands, "options": options}
    lines = {
        part: ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        for part, entries in parts.items()
    }
    return "{" + ",\n".join(f'"{part}": {{\n{text}\n}}' for part, text in lines.items()) + "}\n"


if __name__ == "__main__":
    TABLE.write_text(generate(), encoding="utf-8")
