"""Files that are there whole or not at all, on disk and not only in memory, and readable by whom the umask lets.

Every file that the package leaves behind is written here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_vlmq.core.errors import first_line


def _machine() -> str:
    numbering = ""
    with suppress(OSError):  # Linux alone says it
        numbering = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {numbering}".encode()).hexdigest()[:8]


MACHINE = _machine()
"""Where a process number means the same process: this machine, and of it this container, which may share its name with others."""
_PARTIAL = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.partial")
STALE_SECONDS = 24 * 3600
"""Age at which a partial file counts as left behind by a killed writer of another machine or container."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to, which then takes its place; after an exception nothing is left of it.

    What was written is on disk before it is moved, and has the mode that the umask gives to new files, whatever mode its writer chose.
    What killed writers left in the folder is deleted on the way.

    Args:
        path: the file to write or replace; its folder is made if need be.

    Raises:
        OSError: the disk does not take it, whichever library said so; ``filename`` is the path.
    """
    with scratch(path) as partial:
        try:
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        except Exception as error:
            if (found := disk_error(error, path)) is not None:
                raise found from error
            raise


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A hidden file beside ``path``, empty and gone afterwards; a killed process leaves it to the next writer to delete.

    Raises:
        OSError: it cannot be made; ``filename`` is the path.
    """
    partial = path.with_name(f".{path.name[:100]}.{MACHINE}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            partial.touch()
        except OSError as error:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all. Raises as :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def disk_error(error: BaseException, path: str | os.PathLike[str]) -> OSError | None:
    """What a library raised because a disk did not take a file, as an ``OSError`` that names it; ``None`` for anything else.

    safetensors and torch's archives raise errors of their own, pyarrow one without a path.

    Args:
        error: what was raised while ``path`` was written.
        path: the file.
    """
    text = first_line(error)
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        return OSError(number, os.strerror(number) if error.errno else text, os.fspath(path))
    if found := re.search(r"\(os error (\d+)\)", text):
        return OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path))
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text):
        return OSError(errno.EIO, "it could not be written whole, is the disk full?", os.fspath(path))
    return None


def remove_leftovers(folder: Path, below: bool = False) -> int:
    """Delete what killed writers left in a folder: partial files of dead processes of :data:`MACHINE`, others' after a day.

    Args:
        folder: where.
        below: whether to look into its folders too.

    Returns:
        How many files were deleted. A folder that is missing or cannot be changed is no error.
    """
    removed = 0
    with suppress(OSError):
        for path in folder.rglob(".*.partial") if below else folder.glob(".*.partial"):
            found = _PARTIAL.fullmatch(path.name)
            if found is None:
                continue
            with suppress(OSError):
                alone = found["machine"] == MACHINE and not is_alive(int(found["pid"]))
                if alone or time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
                    removed += 1
    return removed


def require_writable(folder: Path) -> None:
    """Make a folder and write a file into it. Raises ``OSError`` where that fails, before any work is done in vain."""
    with replacing(folder / ".writable"):
        pass
    (folder / ".writable").unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine (:data:`MACHINE`) is there, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot flush a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
