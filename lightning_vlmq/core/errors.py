"""Errors a user can act on: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable

from lightning_vlmq.core.names import one_line


class VLMQError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do about it.

    The command-line entry points print it and exit with code 2; library callers get an ordinary ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> VLMQError:
    """Build the error for a name that no registry holds, with the nearest names that one does.

    Args:
        kind: what was looked up, e.g. ``"method"``.
        name: the name that was asked for.
        known: every name that would have worked.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
    return VLMQError(f"unknown {kind} '{name}'; {hint}")


def first_line(error: BaseException) -> str:
    r"""What an exception says first: its first line that holds something, at most 300 characters; its kind where it says nothing.

    Example:
        >>> first_line(RuntimeError("\nout of memory\n at 0x0")), first_line(KeyError())
        ('out of memory', 'KeyError')
    """
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


_OF_THE_DISK = {
    getattr(errno, name)
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EROFS",
        "EACCES",
        "EPERM",
        "EIO",
        "ENOTDIR",
        "EISDIR",
        "ENAMETOOLONG",
        "EMFILE",
        "ESTALE",
    )
}


def in_one_line(error: BaseException) -> str | None:
    """What a program says of an error that its user can act on: bad input, or a disk that does not take or give a file.

    Returns:
        One line without control characters; of a disk's error the path and the reason. ``None`` for any other error, a fault.
    """
    if isinstance(error, VLMQError):
        text = str(error)
    elif isinstance(error, OSError) and (
        error.errno in _OF_THE_DISK or (error.errno == errno.ENOENT and error.filename)
    ):
        where = f"'{os.fsdecode(error.filename)}': " if isinstance(error.filename, str | bytes) else ""
        text = f"{where}{os.strerror(error.errno or 0)}; free the disk, or give a place that can be read and written"
    else:
        return None
    return one_line(text)
