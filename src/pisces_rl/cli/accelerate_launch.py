"""A subcommand on several processes, by accelerate's launcher, as TRL's program does it."""

import argparse
from collections.abc import Sequence

from accelerate.commands.launch import launch_command, launch_command_parser

#: Options of `accelerate launch` that a user sets beside its file; others stand in the file.
_OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")


def launch(name: str, arguments: Sequence[str]) -> None:
    """`accelerate launch --config_file FILE [--num_processes N ...] -m pisces_rl NAME ...`.

    Args:
        name: of the subcommand.
        arguments: its command line, with --accelerate_config FILE.
    """
    parser = argparse.ArgumentParser(prog=f"pisces-rl {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    for option in _OPTIONS:
        parser.add_argument(f"--{option}")
    given, rest = parser.parse_known_args(arguments)
    options = [word for option in _OPTIONS if (value := getattr(given, option)) is not None
               for word in (f"--{option}", value)]  # fmt: skip
    launch_command(launch_command_parser().parse_args(
        ["--config_file", given.accelerate_config, *options, "-m", "pisces_rl", name, *rest]))  # fmt: skip
