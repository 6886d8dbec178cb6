"""Who computes a run: one file per run, so that two runners on one store share the work."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_vlmq.core.atomic import MACHINE, is_alive
from lightning_vlmq.core.errors import VLMQError

BEAT_SECONDS = 30.0
"""How often a runner says that it is alive."""
STALE_SECONDS = 600.0
"""A claim whose runner has not said so for this long is anybody's."""


@dataclass(frozen=True)
class Holder:
    """Who claims a run.

    Attributes:
        host: name of the machine, for who reads it.
        machine: :data:`~lightning_vlmq.core.atomic.MACHINE` there.
        pid: the process there.
        since: when, seconds of the epoch.
        token: of this claim alone.
    """

    host: str
    machine: str
    pid: int
    since: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claims:
    """Claims on the runs of a store, ``<root>/claims/<run_id>.json``.

    A claim is taken over where its process is gone (on this machine, in this container), or has not touched the file for
    :data:`STALE_SECONDS` (on any).
    Should two runners compute the same run all the same, both file it whole, and nothing is lost but time.

    Args:
        root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "claims"

    @contextmanager
    def claim(self, run_id: str) -> Iterator[Holder | None]:
        """Claim a run for as long as the context lasts.

        Yields:
            ``None`` where the run is this process's now, else who has it.

        Raises:
            VLMQError: the claim cannot be written.
        """
        path = self.folder / f"{run_id}.json"
        own = Holder(platform.node(), MACHINE, os.getpid(), time.time(), uuid.uuid4().hex)
        try:
            other = self._take(path, own)
        except OSError as error:
            raise VLMQError(
                f"'{path}' cannot be written ({error.strerror or error}); free the disk or give another root"
            ) from error
        if other is not None:
            yield other
            return
        ended = threading.Event()
        threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
        try:
            yield None
        finally:
            ended.set()
            self._release(path, own)

    def held(self) -> dict[str, Holder]:
        """Who computes what now, by run: claims whose holder is alive. Of this process's own too."""
        found = {}
        for path in sorted(self.folder.glob("[!.]*.json")):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    holder = _read(descriptor)
                    is_own = holder is not None and holder.machine == MACHINE and holder.pid == os.getpid()
                    if holder is not None and (is_own or not _is_dead(holder, descriptor)):
                        found[path.stem] = holder
                finally:
                    os.close(descriptor)
        return found

    def _take(self, path: Path, own: Holder) -> Holder | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with _locked(path, os.O_RDWR | os.O_CREAT) as descriptor:
                if descriptor is None:  # released between opening and locking
                    continue
                found = _read(descriptor)
                if found is not None and not _is_dead(found, descriptor):
                    return found
                content = json.dumps(vars(own)).encode()
                os.pwrite(descriptor, content, 0)
                os.ftruncate(descriptor, len(content))
                os.fsync(descriptor)
                return None

    def _release(self, path: Path, own: Holder) -> None:
        with suppress(OSError), _locked(path, os.O_RDWR) as descriptor:
            if descriptor is not None and _read(descriptor) == own:  # another may have taken it over
                path.unlink()


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[int | None]:
    """The claim's descriptor, nobody else reading or writing it meanwhile; ``None`` where the file was removed before that."""
    descriptor = os.open(path, flags, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: at worst two runners compute the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        yield descriptor if same else None
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Holder | None:
    """Whom a claim names; ``None`` for an empty or damaged one."""
    with suppress(ValueError, TypeError, RecursionError):
        content: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        found = Holder(**content)
        if isinstance(found.pid, int) and isinstance(found.machine, str):
            return found
    return None


def _is_dead(holder: Holder, descriptor: int) -> bool:
    if holder.machine == MACHINE and (holder.pid == os.getpid() or not is_alive(holder.pid)):
        return True  # this process holds none when it asks; one of its number that ran before does not matter
    return time.time() - os.fstat(descriptor).st_mtime > STALE_SECONDS


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
