"""Commands of ``vlmq`` beside LightningCLI's: a module a command, which files a function of its argument list by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from lightning_vlmq.core.registry import Registry

COMMANDS: Registry[Callable[[list[str]], None]] = Registry("command")
"""What runs ``vlmq <name> <arguments>``; raises :class:`~lightning_vlmq.core.errors.VLMQError` or jsonargparse's ``ArgumentError``."""

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
