"""Files that are there whole or not at all, on disk and not only in memory, and readable by whom the umask lets."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_PARTIAL = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.partial")
STALE_SECONDS = 24 * 3600
"""Age at which a partial file counts as left behind by a killed writer of another machine."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to, which then takes its place; after an exception nothing is left of it.

    What was written is on disk before it is moved, and has the mode that the umask gives to new files, whatever mode its writer chose.

    Args:
        path: the file to write or replace; its folder is there.
    """
    partial = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Delete what killed writers left in a folder: partial files of dead processes of this machine, and of others after a day.

    Returns:
        How many files were deleted. A folder that is missing or cannot be changed is no error.
    """
    removed = 0
    with suppress(OSError):
        for path in folder.iterdir():
            found = _PARTIAL.fullmatch(path.name)
            if found is None:
                continue
            with suppress(OSError):
                alone = not _is_alive(int(found["pid"])) if found["host"] == _HOST else False
                if alone or time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
                    removed += 1
    return removed


def require_writable(folder: Path) -> None:
    """Make a folder and write a file into it. Raises ``OSError`` where that fails, before any work is done in vain."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "writable"):
        pass
    (folder / "writable").unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
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
