"""`pisces-rl completion`: a script that completes subcommands and options, from what their --help says."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping

SHELLS = ("bash", "zsh")
SCRIPT = """\
_pisces_rl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then words="{names}"
    else case "${{COMP_WORDS[1]}}" in
{cases}
    esac; fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _pisces_rl pisces-rl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="Its script is printed: pisces-rl completion bash > FILE.")


def main(args: argparse.Namespace) -> None:
    from pisces_rl.cli.train_command import TRAINERS
    from pisces_rl.command import COMMANDS
    from pisces_rl.command import main as program

    inner = {"train": [["--method", name] for name in TRAINERS], "vbench": [[], ["export"], ["read"]]}
    words = {
        name: sorted({word for more in inner.get(name, [[]]) for word in words_of_help(program, [name, *more])})
        for name in COMMANDS
    }
    words["vbench"] += ["export", "read"]
    print({"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}[args.shell] + script(words), end="")


def words_of_help(program: Callable, arguments: list[str]) -> set[str]:
    """The options that a command's --help names, of two spellings that with underscores."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        program([*arguments, "--help"])
    found = set(re.findall(r"(?<![\w-])--\w[\w-]*", printed.getvalue()))
    return {word for word in found if "--" + word[2:].replace("-", "_") not in found - {word}}


def script(words: Mapping[str, list[str]]) -> str:
    cases = "\n".join(f'        {name}) words="{" ".join(options)}" ;;' for name, options in words.items())
    return SCRIPT.format(names=" ".join(words), cases=cases)
