"""`pisces-rl completion`: print a script that completes subcommands, options and values, as --help lists them."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Set

SHELLS = ("bash", "zsh")
ZSH = """\
(( $+functions[compdef] )) || { autoload -U compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""
#: Completes words that begin with a dash as options, and others as a value of the preceding option, or else as files.
#: bash splits --option=value into three words, zsh does not; there, files are offered only after a space.
SCRIPT = """\
_pisces_rl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words="" option="" prefix="" at=$COMP_CWORD
    [ "$word" = "=" ] && word=""
    if [[ "$word" == -*=* ]]; then option="${{word%%=*}}"; prefix="$option="; word="${{word#*=}}"
    else
        while [ "$at" -gt 1 ] && {{ [ "$at" -eq "$COMP_CWORD" ] || [[ "${{COMP_WORDS[at]}}" != -* ]]; }}; do
            at=$((at - 1))
        done
        option="${{COMP_WORDS[at]}}"
    fi
    if [ "$COMP_CWORD" -eq 1 ]; then words="{names}"
    elif [[ "$word" == -* ]]; then case "${{COMP_WORDS[1]}}" in
{options}
    esac
    else case "${{COMP_WORDS[1]}} $option" in
{values}
    esac; fi
    COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$word"))
}}
complete -o default -F _pisces_rl pisces-rl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=SHELLS, help="The shell to print a script for: pisces-rl completion bash > FILE."
    )


def main(args: argparse.Namespace) -> None:
    from pisces_rl.cli.help_table import methods
    from pisces_rl.command import COMMANDS
    from pisces_rl.command import main as program
    from pisces_rl.rewards import REWARDS

    inner = {"train": [["--method", name] for name in methods("train")], "vbench": [[], ["export"], ["read"]]}
    words = {}
    for name in COMMANDS:
        words[name] = {}
        for more in inner.get(name, [[]]):
            words[name] |= words_of_help(program, [name, *more])
        for option in {"--rewards", "--judges"} & words[name].keys():
            words[name][option] = set(REWARDS)
    print({"bash": "", "zsh": ZSH}[args.shell] + script(words), end="")


def words_of_help(program: Callable, arguments: list[str]) -> dict[str, set[str]]:
    """Return {option: choices} from a command's --help. Choices of positional arguments are under the command's name.
    If an option has two spellings, only the one with underscores is kept."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        program([*arguments, "--help"])
    found = dict.fromkeys(re.findall(r"(?<![\w-])--\w[\w-]*", printed.getvalue()), frozenset())
    for option, choices in re.findall(r"^  (?:.*?(--\w[\w-]*) )?\[?{([\w,-]+)}", printed.getvalue(), re.MULTILINE):
        found[option or arguments[0]] = set(choices.split(","))
    return {word: found[word] for word in found if "--" + word[2:].replace("-", "_") not in found.keys() - {word}}


def script(words: Mapping[str, Mapping[str, Set[str]]]) -> str:
    """Return the completion function.

    Args:
        words: {subcommand: {option: choices}}; the choices of positional arguments are under the subcommand's name.
    """

    def case(pattern: str, offered: Set[str]) -> str:
        return f'        "{pattern}") words="{" ".join(sorted(offered))}" ;;'

    options = [case(name, found.keys() - {name}) for name, found in words.items()]
    values = [
        case(f"{name} {option}", choices)
        for name, found in words.items()
        for option, choices in sorted(found.items())
        if choices
    ]
    return SCRIPT.format(names=" ".join(words), options="\n".join(options), values="\n".join(values))
