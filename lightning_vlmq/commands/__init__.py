"""The commands of ``vlmq``: one module each (or a few that belong together), which files a function of an argument list by name.

These modules are imported to answer ``vlmq --help``: what is heavy is imported inside the function.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.registry import Registry

GROUPS = ("Run one model", "Read results", "Look around", "Data and models")
"""Headings of ``vlmq --help``, in order."""


class WordParser(argparse.ArgumentParser):
    """A parser that says what is wrong with a command line in one line, as everything else is said."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`~lightning_vlmq.core.errors.VLMQError` in place of printing the usage and leaving."""
        raise VLMQError(f"{message}; {self.prog} --help says what it takes")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: takes the words after the command's name; raises :class:`~lightning_vlmq.core.errors.VLMQError` or jsonargparse's
            ``ArgumentError``.
        group: one of :data:`GROUPS`.
        summary: one line.
    """

    run: Callable[[list[str]], None]
    group: str
    summary: str


COMMANDS: Registry[Command] = Registry("command")
"""What ``vlmq <name>`` runs."""


def command(name: str, group: str) -> Callable[[Callable[[list[str]], None]], Callable[[list[str]], None]]:
    """Decorator that files a function as a command; the first line of its docstring is the summary."""

    def file(run: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        COMMANDS.register(name)(Command(run, group, (run.__doc__ or "").strip().splitlines()[0].rstrip(".")))
        return run

    return file


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
