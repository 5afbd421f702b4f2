"""The `pisces-rl` program: a table of subcommands, each a module that is imported only when it is called."""

import argparse
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from . import __version__

TRACEBACK = "PISCES_RL_TRACEBACK"
EPILOG = """
pisces-rl COMMAND --help lists a command's options.

train, evaluate, fit-map and estimate take --config FILE.yaml; the command line
overrides the file. To use several processes: pisces-rl train --num_processes N,
or --accelerate_config FILE (also for fit-map and vbench); accelerate launch -m
pisces_rl train ... is equivalent.

Exit status: 0; 1 on an error, 2 on an invalid command line, 130 on Ctrl-C."""


def by_options(module: ModuleType, prog: str, purpose: str, arguments: list[str]) -> None:
    """Run a module that has `add_arguments(parser)` and `main(args)`."""
    parser = CommandParser(
        prog=prog,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    module.add_arguments(parser)
    module.main(parser.parse_args(arguments))


def by_settings(module: ModuleType, prog: str, purpose: str, arguments: list[str]) -> None:
    """Run a module whose `main(arguments, prog)` reads dataclasses with `cli.parse_arguments`."""
    module.main(arguments, prog)


#: Subcommand: (purpose, module in this package, function that runs it). A new subcommand is one line here.
COMMANDS: dict[str, tuple[str, str, Callable]] = {
    "train": ("train by --method grpo, nft, awm, rvm, backprop, ...", "cli.train_command", by_settings),
    "sample": ("sample videos before and after training", "cli.sample_command", by_options),
    "evaluate": ("test what rewards measure", "cli.evaluate_command", by_settings),
    "fit-map": ("fit the map of the reward ot_quality", "cli.fit_map_command", by_settings),
    "estimate": ("estimate a run's memory, without weights or a GPU", "cli.estimate_command", by_settings),
    "export": ("export an adapter for ComfyUI or PEFT, or merge it", "cli.export_command", by_options),
    "serve": ("serve this machine's rewards to trainers elsewhere", "rewards.server.serve", by_options),
    "vbench": ("sample videos for VBench, or read its results", "evaluation.vbench.vbench_command", by_options),
    "convert": ("convert a reward's pickle to safetensors", "rewards.scorers.convert_weights", by_options),
    "report": ("write one page on a run, or on several side by side", "run_page.report_command", by_options),
    "env": ("print version information for a bug report", "cli.env_command", by_options),
    "completion": ("print a shell completion script", "cli.completion_command", by_options),
}
LAUNCHED = ("train", "fit-map", "vbench")  # can use several processes: --accelerate_config, --num_processes


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors suggest the nearest known words."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)", message)
        if wrong:
            choice, option = wrong.groups()
            known = _words(self, options=option is not None)
            near = difflib.get_close_matches((choice or option or "").split("=")[0], known, n=3)
            message = re.sub(r" \(choose from .*\)", "", message) if near else message
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        super().error(message)


def _words(parser: argparse.ArgumentParser, options: bool) -> list[str]:
    """Return the options of a parser and its subparsers, or else their choices."""
    words: list[str] = []
    for action in parser._actions:
        words += action.option_strings if options else [str(choice) for choice in action.choices or ()]
        if isinstance(action, argparse._SubParsersAction):
            words += [word for inner in action.choices.values() for word in _words(inner, options)]
    return list(dict.fromkeys(words))


def command_parser() -> CommandParser:
    """Return the parser of the program's options and the subcommand's name."""
    parser = CommandParser(
        prog="pisces-rl",
        description="Reinforcement-learning post-training of text-to-video diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="pisces-rl [--version] [--traceback] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"pisces_rl {__version__}")
    parser.add_argument("--traceback", action="store_true", help=f"Show an error's traceback, as {TRACEBACK}=1 does.")
    commands = parser.add_subparsers(
        dest="command", required=True, title="commands", metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for name, (purpose, _, _) in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        SystemExit: 1 with a message on a user error (ValueError, OSError or ImportError), 2 on an invalid command
            line, 130 on Ctrl-C. Other errors propagate with their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    named = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    before, rest = arguments[: named + 1], arguments[named + 1 :]
    args = command_parser().parse_args(before or ["--help"])
    trace = args.traceback or os.environ.get(TRACEBACK, "0") not in ("", "0")
    prog = f"pisces-rl {args.command}"
    try:
        run(args.command, prog, rest)
    except KeyboardInterrupt:
        if trace:
            raise
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError) as error:
        if trace:
            raise
        raise SystemExit(f"{prog}: {sentence(error)}") from error


def run(name: str, prog: str, arguments: list[str]) -> None:
    """Run a subcommand, in this process or in processes that accelerate starts."""
    purpose, module, read = COMMANDS[name]
    help_asked = not {"-h", "--help"}.isdisjoint(arguments)
    if help_asked and read is by_settings:
        from .cli.arguments import show_help

        show_help(name, arguments, prog)
    if name in LAUNCHED and not help_asked:
        from .cli.accelerate_launch import launch, launched

        if launched(arguments):
            launch(name, arguments)
            return
    if name not in ("convert", "env", "completion") and not help_asked:
        from .cli.quiet import quiet

        quiet()
    read(importlib.import_module(f".{module}", __package__), prog, purpose, arguments)


def sentence(error: Exception) -> str:
    """Return the error's message and, if another package raised it, how to see its traceback."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    foreign = not frames[-1].startswith("pisces_rl")
    text, kind = str(error) or type(error).__name__, type(error).__name__
    return f"{text}\n(pisces-rl --traceback ... shows where this {kind} comes from)" if foreign else text


if __name__ == "__main__":
    main()
