"""Run a subcommand on several processes with accelerate's launcher, as TRL's program does."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import RECIPES, usage_error

#: Options passed on to `accelerate launch`; any of them starts processes. Other options belong in the config file.
_OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")
FILES = RECIPES / "accelerate"


def launched(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for several processes."""
    options = {f"--{option}" for option in ("accelerate_config", *_OPTIONS)}
    return any(argument.split("=")[0] in options for argument in arguments)


def launch(name: str, arguments: Sequence[str]) -> None:
    """Run `accelerate launch --config_file FILE [--num_processes N ...] -m pisces_rl NAME ...`.

    Args:
        name: the subcommand.
        arguments: its command line, with `--accelerate_config FILE` (a path, or a name in recipes/accelerate) or
            `--num_processes N`.

    Raises:
        SystemExit: the file does not exist or N is not positive (status 2), or a process failed after it printed its
            error (status 1).
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = argparse.ArgumentParser(prog=f"pisces-rl {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    for option in _OPTIONS:
        parser.add_argument(f"--{option}")
    given, rest = parser.parse_known_args(arguments)
    count = given.num_processes
    if count is not None and not (count.isdecimal() and int(count)):
        usage_error(f"--num_processes {count}: give a positive integer.", parser.prog)
    options = [f"--{option}={value}" for option in _OPTIONS if (value := getattr(given, option)) is not None]
    if given.accelerate_config is not None:
        options.insert(0, f"--config_file={config_file(given.accelerate_config, parser.prog)}")
    args = launch_command_parser().parse_args(["--quiet", *options, "-m", "pisces_rl", name, *rest])
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(f"pisces-rl {name}: process {rank} ended with status {failure.exitcode}.") from error


def config_file(name: str, prog: str) -> Path:
    """Return the path of an accelerate config: `name` itself, or the file of that name in recipes/accelerate."""
    for path in (Path(name), FILES / f"{name}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in FILES.glob("*.yaml")))
    known = f", and it is none of {names}" if names else ""
    usage_error(f"--accelerate_config {name}: no such file{known}.", prog)
