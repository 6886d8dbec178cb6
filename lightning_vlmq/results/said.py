"""What is said of a run beside its rows: when it was filed, under which settings, as which experiment, made of what, in what time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import describe
from lightning_vlmq.statistics import Statistics

WRITTEN = b"lightning_vlmq.written"
STATISTICS = b"lightning_vlmq.statistics"
SECONDS = b"lightning_vlmq.seconds"
CORES = b"lightning_vlmq.cpu_count"
IDENTITY = b"lightning_vlmq.identity"
COMPANIONS = b"lightning_vlmq.companions"
SIBLINGS = b"lightning_vlmq.siblings"
FACTS = b"lightning_vlmq.facts"
SOURCE = b"lightning_vlmq.source"


def say(
    statistics: Statistics,
    identity: Mapping[str, Any] | None,
    companions: Sequence[str],
    siblings: Mapping[str, str],
    facts: Mapping[str, float],
    seconds: float | None,
    source: str = "",
) -> dict[bytes, bytes]:
    """Metadata of a results part, as :class:`Said` reads it.

    Args:
        statistics: the settings that the rows were computed with.
        identity: what decides the numbers.
        companions: runs filed before as parts of this one.
        siblings: digests of the run's other parts, by kind.
        facts: numbers about the making of the run; ``written``, seconds of the epoch, joins them.
        seconds: how long the model took to make, or ``None``; the number of CPU cores is kept beside it.
        source: where the weights came from, in words; no part of the identity, which has their content.
    """
    now = datetime.now(UTC)
    metadata = {
        WRITTEN: now.isoformat().encode(),
        STATISTICS: json.dumps(asdict(statistics)).encode(),
        IDENTITY: json.dumps(describe(identity or {})).encode(),
        COMPANIONS: json.dumps(list(companions)).encode(),
        SIBLINGS: json.dumps(dict(siblings)).encode(),
        FACTS: json.dumps({**facts, "written": now.timestamp()}).encode(),
        SOURCE: source.encode(),
    }
    if seconds is not None:
        metadata |= {SECONDS: repr(seconds).encode(), CORES: str(os.cpu_count()).encode()}
    return metadata


class Said:
    """Reads the metadata of a run's results part.

    Args:
        metadata: as :func:`say` made it.
        where: which run, for messages.
    """

    def __init__(self, metadata: Mapping[bytes, bytes], where: str) -> None:
        self._metadata, self._where = metadata, where

    @property
    def written(self) -> datetime:
        """When the run was filed (UTC), by the clock of the machine that filed it. Raises :class:`VLMQError` where that is not said."""
        if WRITTEN not in self._metadata:
            raise VLMQError(f"{self._where} was not written by a results store; delete it")
        return datetime.fromisoformat(self._metadata[WRITTEN].decode())

    @property
    def statistics(self) -> Statistics:
        """The settings that the rows were computed with. Raises :class:`VLMQError` where they are not said, or unknown."""
        try:
            return Statistics(**json.loads(self._metadata[STATISTICS]))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise VLMQError(
                f"{self._where} does not say how its statistics were computed; delete it and run it again"
            ) from None

    @property
    def seconds(self) -> tuple[float, int]:
        """How long the model took to make, in seconds, and on how many CPU cores. Raises :class:`VLMQError` where that is not said."""
        if SECONDS not in self._metadata:
            raise VLMQError(f"{self._where} was stored without its duration; delete it and run it again")
        return float(self._metadata[SECONDS]), int(self._metadata[CORES])

    @property
    def identity(self) -> dict[str, Any]:
        """What decided the numbers; empty where nothing is said."""
        stored: dict[str, Any] = json.loads(self._metadata.get(IDENTITY, b"{}"))
        return stored

    @property
    def facts(self) -> dict[str, float]:
        """Numbers about the making of the run, by name."""
        return {str(name): float(value) for name, value in json.loads(self._metadata.get(FACTS, b"{}")).items()}

    @property
    def source(self) -> str:
        """Where the weights came from; empty where nothing is said."""
        return self._metadata.get(SOURCE, b"").decode()

    @property
    def companions(self) -> list[str]:
        """Runs without which this one does not count. Raises :class:`KeyError` or :class:`ValueError` where that is not said."""
        return list(json.loads(self._metadata[COMPANIONS]))

    @property
    def siblings(self) -> dict[str, str]:
        """Digests of the run's other parts, by kind. Raises like :attr:`companions`."""
        return dict(json.loads(self._metadata[SIBLINGS]))
