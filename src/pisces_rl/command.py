"""The program `pisces-rl`; each sub-command is a module with `add_arguments(parser)` and `main(args)`."""

import argparse
from collections.abc import Sequence

from .evaluation.vbench import vbench_command
from .rewards.scorers import convert_weights
from .rewards.server import serve
from .run_page import report_command

COMMANDS = {
    "convert": ("a reward's published pickle as safetensors", convert_weights),
    "report": ("one page of a run's videos, scores and curves, or of several runs side by side", report_command),
    "serve": ("rewards of this machine for trainers elsewhere", serve),
    "vbench": ("videos for VBench's runner, and its results before and after training", vbench_command),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pisces-rl", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (purpose, module) in COMMANDS.items():
        own = commands.add_parser(name, help=purpose, description=f"{name}: {purpose}.", allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
        module.add_arguments(own)
        own.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    args.main(args)


if __name__ == "__main__":
    main()
