"""Code that the commands share: arguments from YAML and the command line, prompts and rewards by name."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from . import usage_error
from .help_table import STYLE, HelpFormatter, list_options, listed_parser, methods, methods_with

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import HfArgumentParser

DEFAULT_METHOD = "rvm"
#: The method, by command, if neither the command line nor its recipe names one; `train` rejects such a recipe.
UNNAMED = {"estimate": "grpo"}


def parse_arguments(*dataclasses: type, arguments: Sequence[str] | None = None, prog: str | None = None) -> tuple:
    """Parse dataclasses from `--config file.yaml` and the command line, which overrides the file.

    Args:
        dataclasses: one or more dataclass types; no two may share a field.
        arguments: the command line without the program's name; None takes `sys.argv`.
        prog: the program's name in its help and errors; None takes `sys.argv`.

    Returns:
        One instance of each dataclass.

    Raises:
        SystemExit: an argument or YAML key is invalid (status 2); if it is unknown, the message names the nearest one.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = settings_parser(*dataclasses, prog=prog)
    arguments = _with_config(parser, arguments)
    *instances, rest = parser.parse_args_into_dataclasses(args=arguments, return_remaining_strings=True)
    for argument in rest:
        name = argument.lstrip("-").split("=")[0].replace("-", "_")
        parser.error(f"unknown argument {argument!r}{_advice(name, _known(parser), '--')}")
    return tuple(instances[: len(dataclasses)])


def settings_parser(*dataclasses: type, prog: str | None = None) -> "HfArgumentParser":
    """Return the parser of dataclasses and --config."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(dataclasses, prog=prog, formatter_class=HelpFormatter, **STYLE)
    parser.add_argument("--config", help="YAML file of settings; the command line overrides it.")
    own, inherited = [], []
    for action in parser._optionals._group_actions:
        (inherited if _is_inherited(action.dest, dataclasses) else own).append(action)
    list_options(parser, own, inherited)
    return parser


def _is_inherited(name: str, dataclasses: Sequence[type]) -> bool:
    """Return whether a setting comes from transformers or TRL and no class of this package overrides it."""
    owners = [cls.__module__ for d in dataclasses for cls in d.__mro__ if name in vars(cls).get("__annotations__", {})]
    return bool(owners) and not any(owner.startswith(__name__.partition(".")[0]) for owner in owners)


def show_help(command: str, arguments: Sequence[str], prog: str) -> None:
    """If the command line asks for help, print it from the table of options and end the program.

    Raises:
        SystemExit: help is printed (status 0), or a choice, a method or a recipe's key is invalid (status 2).
    """
    named = methods(command)
    method = method_of(arguments, named, UNNAMED.get(command), prog) if named else None
    parser = listed_parser(command, method, prog)
    parser.parse_known_args(_with_config(parser, list(arguments)))


def method_of(argv: Sequence[str], methods: Iterable[str], unnamed: str | None = None, prog: str | None = None) -> str:
    """Return the method that the command line or its recipe names; it selects the config class.

    Args:
        argv: the command line without the program's name.
        methods: the names that are allowed.
        unnamed: the method to use if the recipe names none; None makes a recipe without a method an error.
        prog: the program's name in errors.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, **STYLE)
    parser.add_argument("--method")
    parser.add_argument("--config")
    known = parser.parse_known_args(argv)[0]
    method = known.method
    if method is None and known.config is not None and os.path.isfile(known.config):
        method = _read_yaml(parser, known.config).get("method", unnamed)
        if method is None:
            usage_error(f"{known.config} names no method; add --method, one of {', '.join(methods)}.", prog)
        method = str(method)
    method = method or unnamed or DEFAULT_METHOD
    if method not in methods:
        usage_error(f"--method {method!r} must be one of {', '.join(methods)}{nearest(method, methods)}", prog)
    return method


def _known(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help"}


def _with_config(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Return the command line after the settings of its --config file."""
    path = _config_path(arguments)
    if path is None:
        return arguments
    settings, known = _read_yaml(parser, path), _known(parser)
    for key in settings:
        if key not in known:
            parser.error(f"{path}: unknown key {key!r}{_advice(str(key), known)}")
    return _as_arguments(parser, path, settings) + arguments


def _config_path(arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def _read_yaml(parser: argparse.ArgumentParser, path: str) -> dict:
    if not os.path.isfile(path):
        parser.error(f"--config {path}: no such file; the recipes are in recipes/.")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not YAML: {error}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must hold `name: value` lines.")
    return settings


def _as_arguments(parser: argparse.ArgumentParser, path: str, settings: dict) -> list[str]:
    """Convert a file's settings to a command line, so that both are checked by the same code."""
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for key, value in settings.items():
        action = actions[key]
        if value is None or value == []:  # a command line cannot express these
            parser.set_defaults(**{key: value})
            action.required = False
        elif isinstance(value, list):
            if action.nargs not in ("+", "*"):
                parser.error(f"{path}: {key} takes one value, not the list {value}.")
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            arguments.append(f"--{key}={json.dumps(value)}")
        elif value is False and "no" in (action.choices or ()):  # YAML 1.1 reads a bare no as false
            arguments.append(f"--{key}=no")
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def _advice(name: str, known: set[str], dashes: str = "") -> str:
    """Name the methods that have a setting, if the command can select another method, or else the nearest setting."""
    others = methods_with(name) if "method" in known and name not in known else []
    if others:
        return f": it is a setting of {'method' if len(others) == 1 else 'methods'} {', '.join(others)}."
    return nearest(f"{dashes}{name}", [f"{dashes}{other}" for other in known])


def nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else "."


def load_prompt_dataset(
    source: str, split: str = "train", column: str = "prompt", images: Sequence[str] = ("image",)
) -> "Dataset":
    """Load prompts from a .txt (one per line), .csv, .json or .jsonl file, or from a dataset's Hub id or folder.

    Files are UTF-8, or UTF-16 with a byte order mark. In a .txt, blank lines and surrounding spaces are dropped. A
    .csv is separated by commas, semicolons or tabs. A .json or .jsonl holds a sequence or list of objects, an object
    of lists, or strings. Duplicate prompts are kept.

    Args:
        source: a path or a Hub id.
        split: the split of a Hub dataset.
        column: the column that holds the text; it is renamed to `prompt`.
        images: columns that may hold image paths; relative paths are resolved against the file's folder.

    Raises:
        ValueError: the file is missing, empty or unreadable, lacks the column, or has a row without a prompt.
    """
    from datasets import load_dataset

    from ..prompt_files import PROMPT_FILES, read_prompt_file

    if Path(source).suffix.lower() in PROMPT_FILES:
        dataset = _beside(read_prompt_file(source, column), Path(source).parent, images)
    else:
        try:
            dataset = load_dataset(source, split=split)
        except Exception as error:  # datasets raises many types; all mean the same to the user
            raise ValueError(
                f"dataset={source!r} is neither a .txt, .csv, .json or .jsonl file nor a dataset that could be "
                f"loaded (split {split!r}): {error}"
            ) from error
    if len(dataset) == 0:
        raise ValueError(f"dataset={source!r} holds no prompts; it needs at least one.")
    if column not in dataset.column_names:
        raise ValueError(
            f"dataset={source!r} has columns {dataset.column_names} but none named {column!r}; name the text column "
            "with --dataset_column."
        )
    if column != "prompt":
        if "prompt" in dataset.column_names:
            raise ValueError(
                f"dataset={source!r} has a column 'prompt' beside {column!r}, which becomes 'prompt'; remove one."
            )
        dataset = dataset.rename_column(column, "prompt")
    return dataset


def _beside(dataset: "Dataset", folder: Path, columns: Sequence[str]) -> "Dataset":
    """Prefix relative paths of files in the folder with the folder; leave all other values as they are."""
    from datasets import Value

    for name in columns:
        if name in dataset.column_names and dataset.features[name] == Value("string"):
            found = [str(folder / p) if p and (folder / p).is_file() else p for p in dataset[name]]
            dataset = dataset.remove_columns(name).add_column(name, found)
    return dataset


# {reward: {a setting that it reads: its keyword in `load_reward`}}
_TRANSPORT_SETTINGS = {
    "ot_quality": {"ot_map": "ot_map", "divergence_weight": "divergence_weight", "ot_solver": "solver"},
    "ot_semantic": {"ot_attention": "attention", "ot_solver": "solver"},
}


def unread_settings(settings: object, names: Iterable[str]) -> list[str]:
    """Return those of --ot_map, --divergence_weight, --ot_attention and --ot_solver that are given but that no reward
    reads; arguments as in `transport_options`."""
    read = {setting for name in names for setting in _read_by(name, settings)}
    return [setting for setting in _given(settings) if setting not in read]


def transport_options(settings: object, names: Iterable[str]) -> dict[str, dict]:
    """Return {name: keywords of `load_reward`} from --ot_map, --divergence_weight, --ot_attention and --ot_solver.

    Args:
        settings: a dataclass of settings; `pisces-rl evaluate` has no divergence_weight.
        names: all rewards and judges, as on the command line. An option in a name (ot_quality?ot_map=FOLDER) replaces
            the setting.

    Raises:
        ValueError: a setting is given that none of the rewards and judges reads, or --ot_attention is no JSON object.
    """
    names = list(names)
    if unread := unread_settings(settings, names):
        raise ValueError(
            f"{', '.join(f'--{setting}' for setting in unread)}: no reward or judge reads this. ot_map and "
            "divergence_weight are for ot_quality, ot_attention is for ot_semantic, and ot_solver is for ot_semantic "
            "and for ot_quality with a divergence_weight. Add such a reward, or leave the setting out."
        )
    given = _given(settings)
    if "ot_attention" in given:
        given["ot_attention"] = _json_object("--ot_attention", given["ot_attention"])
    return {name: {keyword: given[setting] for setting, keyword in _read_by(name, settings).items()} for name in names}


def _given(settings: object) -> dict[str, object]:
    names = {setting: None for own in _TRANSPORT_SETTINGS.values() for setting in own}
    return {name: value for name in names if (value := getattr(settings, name, None)) not in (None, 0)}


def _read_by(name: str, settings: object) -> dict[str, str]:
    """Return {setting: keyword of `load_reward`} of the given settings that a reward reads."""
    from pisces_rl.rewards.loading import split_options

    kind = name.partition("?")[0]
    if kind not in _TRANSPORT_SETTINGS:
        return {}
    given, own = _given(settings), split_options(name)[1] if "?" in name else {}
    reads = {s: word for s, word in _TRANSPORT_SETTINGS[kind].items() if s in given and word not in own}
    if kind == "ot_quality" and not own.get("divergence_weight", given.get("divergence_weight")):
        reads.pop("ot_solver", None)
    return reads


def _json_object(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: {text!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f'{name}: expected a JSON object, for instance {{"plan": "partial"}}, got {text}.')
    return value


def load_reward_function(name: str, **options) -> Callable:
    """Call `pisces_rl.rewards.load_reward` with the options that apply to the reward: functions take none of them,
    scorers have no encoder, and OCR and optical flow have nothing to offload."""
    from pisces_rl.rewards import ENCODER_REWARDS, load_reward
    from pisces_rl.rewards.loading import is_known

    plain, _, _ = name.partition("?")
    weightless = plain in ("ocr", "motion_flow")
    unused = () if plain in ENCODER_REWARDS else ("encoder", "offload") if weightless else ("encoder",)
    options = {option: value for option, value in options.items() if option not in unused}
    return load_reward(name, **options) if is_known(name) else load_reward(name, device=options.get("device"))
