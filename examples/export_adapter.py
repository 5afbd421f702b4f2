r"""Export a trained adapter for another program: the same LoRA in other layouts, or merged into the base model.

    python examples/export_adapter.py outputs/run outputs/run --format comfyui
    python examples/export_adapter.py outputs/run exported --format peft --dtype fp32
    python examples/export_adapter.py outputs/run merged --format merged --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

docs/export.md explains the files. `pisces-rl export` is equivalent.
"""

import argparse

from pisces_rl.cli import export_command
from pisces_rl.cli.quiet import quiet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    export_command.add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        export_command.main(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    quiet()
    main()
