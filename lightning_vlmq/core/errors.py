"""Errors a user can act on: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
        "EEXIST",
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


@contextmanager
def parser_errors(before: str = "") -> Iterator[None]:
    """Raise jsonargparse's errors as the package's, in one line; other code's go through as they are.

    What is raised is the package's own error behind the parser's, else the innermost reason and where it applies.

    Args:
        before: what the line begins with.
    """
    import jsonargparse  # imported late: it is heavy, and the names of commands are told without it

    try:
        yield
    except (jsonargparse.ArgumentError, ValueError) as error:
        own = own_error(error)
        if own is None and not isinstance(error, jsonargparse.ArgumentError):
            raise
        said = own or VLMQError(_innermost(str(error)))
        raise (VLMQError(f"{before}{said}") if before else said) from error


def own_error(error: BaseException | None) -> VLMQError | None:
    """The package's own error behind one that the parser wrapped around it."""
    while error is not None and not isinstance(error, VLMQError):
        error = error.__cause__ or error.__context__
    return error


_FRAME = re.compile(
    r"^\s*(-\s)?(Parser key \"[^\"]*\":\s*$|Does not validate|Subtypes:|Errors:|Problem with given class_path|Given value)"
)


def _innermost(message: str) -> str:
    """The innermost reason in a parser's message, which nests one explanation a level of the config, and where it applies."""
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    reasons = [line for line in message.splitlines() if line.strip() and not _FRAME.match(line)]
    reason = max(reasons, key=lambda line: len(line) - len(line.lstrip(" -")), default="see vlmq --help").strip(" -")
    reason = re.sub(r'^Parser key "[^"]+": ', "", reason)
    return f"{keys}: {reason}" if keys else reason
