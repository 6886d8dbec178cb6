"""The program ``vlmq``: finds the command, and says errors in one line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import sys
from importlib import metadata
from itertools import groupby

import lightning_vlmq
from lightning_vlmq.commands import COMMANDS, GROUPS
from lightning_vlmq.core.errors import VLMQError, in_one_line, parser_errors, unknown
from lightning_vlmq.core.stopping import stoppable

_USAGE = """usage: vlmq COMMAND [--config NAME]... [options]

{about}

{commands}
Many models and settings: vlmq-study study=demo; vlmq-study --help

Start with
  vlmq validate --config eval --model.quant.method minmax --model.quant.weight_bits 4
  vlmq list methods

Every command has a --help of its own. vlmq --version names the versions, vlmq doctor what is there and what is missing.
"""


def usage() -> str:
    """What ``vlmq`` and ``vlmq --help`` print: every command by group, in one line each."""
    parts = []
    width = max(map(len, COMMANDS))
    commands = sorted(COMMANDS, key=lambda name: GROUPS.index(COMMANDS[name].group))
    for group, names in groupby(commands, key=lambda name: COMMANDS[name].group):
        lines = (f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names)
        parts.append("\n".join([group, *lines, ""]))
    return _USAGE.format(about=lightning_vlmq.__doc__, commands="\n".join(parts))


def version() -> str:
    """The package's version and those of what decides numbers."""
    packages = ("torch", "torchvision", "torchao", "open_clip_torch", "lightning")
    return (
        f"vlmq {lightning_vlmq.__version__} ("
        + ", ".join(f"{name} {metadata.version(name)}" for name in packages)
        + ")"
    )


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the command line without the program's name; ``None`` takes ``sys.argv``.

    Raises:
        VLMQError: bad input, said in one line.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if name == "--version":
        print(version())
        return
    if name not in COMMANDS:
        if name.startswith("-"):
            raise VLMQError(f"'{name}' comes after a command, e.g. vlmq validate {name} …; vlmq --help lists them")
        raise unknown("command", name, COMMANDS)
    with parser_errors():
        COMMANDS[name].run(rest)


def entry_point() -> None:
    """The console script: bad input and full disks end with one line on standard error and exit code 2, signals with theirs."""
    with stoppable("vlmq", "what was not filed yet starts afresh with the same command"):
        try:
            main()
        except (VLMQError, OSError) as error:
            if (said := in_one_line(error)) is None:
                raise
            print(f"vlmq: error: {said}", file=sys.stderr)
            sys.exit(2)
