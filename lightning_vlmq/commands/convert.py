"""``vlmq convert``: a saved fake-quantized model becomes a low-bit one; see :func:`lightning_vlmq.lowbit.pipeline.convert`."""

from __future__ import annotations

import jsonargparse

from lightning_vlmq.commands import COMMANDS


@COMMANDS.register("convert")
def run(args: list[str]) -> None:
    """Convert a model.

    Args:
        args: the command line after ``vlmq convert``.

    Raises:
        VLMQError: what :func:`~lightning_vlmq.lowbit.pipeline.convert` raises.
    """
    from lightning_vlmq.lowbit.pipeline import (
        convert,
    )  # compilers and exporters come with it, which other commands do without

    jsonargparse.auto_cli(convert, args=args, as_positional=False, prog="vlmq convert", exit_on_error=False)
