"""``vlmq convert``: a saved fake-quantized model becomes a low-bit one; see :func:`lightning_vlmq.lowbit.pipeline.convert`."""

from __future__ import annotations

from lightning_vlmq.commands import command


@command("convert", "Data and models")
def run(args: list[str]) -> None:
    """Turn a saved quantized model into one that holds integers, check and measure it.

    Args:
        args: the command line after ``vlmq convert``.

    Raises:
        VLMQError: what :func:`~lightning_vlmq.lowbit.pipeline.convert` raises.
    """
    import jsonargparse

    from lightning_vlmq.lowbit.pipeline import convert

    jsonargparse.auto_cli(convert, args=args, as_positional=False, prog="vlmq convert", exit_on_error=False)
