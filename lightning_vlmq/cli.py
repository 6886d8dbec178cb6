"""The program ``vlmq``: finds the command, and says errors in one line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from itertools import groupby

import lightning_vlmq
from lightning_vlmq.commands import COMMANDS, GROUPS
from lightning_vlmq.core.errors import VLMQError, in_one_line, unknown
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
    import jsonargparse

    try:
        COMMANDS[name].run(rest)
    except (jsonargparse.ArgumentError, ValueError) as error:
        if (own := _own_error(error)) is not None:
            raise own from error
        if isinstance(error, jsonargparse.ArgumentError):
            raise VLMQError(_one_line(str(error))) from error
        raise


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


def _own_error(error: BaseException | None) -> VLMQError | None:
    """The package's own error behind one that the parser wrapped around it."""
    while error is not None and not isinstance(error, VLMQError):
        error = error.__cause__ or error.__context__
    return error


_FRAME = re.compile(
    r"^\s*(-\s)?(Parser key \"[^\"]*\":\s*$|Does not validate|Subtypes:|Errors:|Problem with given class_path|Given value)"
)


def _one_line(message: str) -> str:
    """The innermost reason in a parser's message, which nests one explanation a level of the config, and where it applies."""
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    reasons = [line for line in message.splitlines() if line.strip() and not _FRAME.match(line)]
    reason = max(reasons, key=lambda line: len(line) - len(line.lstrip(" -")), default="see vlmq --help").strip(" -")
    reason = re.sub(r'^Parser key "[^"]+": ', "", reason)
    return f"{keys}: {reason}" if keys else reason
