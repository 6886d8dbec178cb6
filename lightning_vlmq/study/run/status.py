"""Where a study stands, read from its folder alone: by whoever runs it, and from any other terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.study.run.claims import Claims
from lightning_vlmq.study.run.grid import Run

WINDOW = 3600.0
"""Runs filed in the last so many seconds make the rate."""


@dataclass(frozen=True)
class Status:
    """Where a study stands.

    Attributes:
        total: runs of the grid; 0 where it is not known.
        done: those that are filed.
        failed: those whose last try failed, with the reason in one line.
        running: those that somebody computes now, with who.
        evaluations: evaluation runs in what is filed, of the grid or of all where that is not known.
        per_hour: runs filed per hour, of late; NaN before the second.
        cache_hits: share of the feature look-ups of filed runs that found something; NaN where none were counted.
    """

    total: int
    done: int
    failed: dict[str, str]
    running: dict[str, str]
    evaluations: int
    per_hour: float
    cache_hits: float

    @property
    def left(self) -> timedelta | None:
        """Time left at the present rate; ``None`` where it is not known."""
        if not self.per_hour > 0 or not self.total:
            return None
        return timedelta(seconds=round(3600 * max(self.total - self.done - len(self.failed), 0) / self.per_hour))

    def __str__(self) -> str:
        of = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.done:,}{of} runs done", f"{len(self.failed):,} failed", f"{len(self.running):,} running"]
        parts.append(f"{self.evaluations:,} evaluation runs")
        if self.per_hour > 0:
            parts.append(f"{self.per_hour:,.0f} runs an hour")
        if self.left is not None:
            parts.append(f"{self.left} left")
        if self.cache_hits == self.cache_hits:
            parts.append(f"{100 * self.cache_hits:.0f} % of features from the cache")
        return ", ".join(parts)


def status_of(root: Path, runs: Sequence[Run] | None = None) -> Status:
    """Read where a study stands. Nothing is checked: a damaged part counts as done until the study runs or reports again.

    Args:
        root: the study's folder.
        runs: the grid; ``None`` takes whatever is filed.
    """
    store = ResultsStore(root)
    ids = None if runs is None else {run.run_id for run in runs}
    filed = {name for name in store.run_ids() if ids is None or name in ids}
    failed = {}
    for path in sorted((root / "failures").glob("*.txt")):
        if path.stem not in filed and (ids is None or path.stem in ids):
            with suppress(OSError):  # no file, or gone meanwhile: the run was tried again
                lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                failed[path.stem] = lines[-1] if lines else ""
    running = {name: str(holder) for name, holder in Claims(root).held().items() if ids is None or name in ids}
    dates, evaluations, hits, misses = [], 0, 0.0, 0.0
    every = set(store.run_ids())
    for name in every:
        owner = name.rpartition(".")[0]  # of what is filed as part of a run: it tuned, or after surgery
        if ids is not None and ids.isdisjoint((name, owner)):
            continue
        with suppress(VLMQError, OSError):
            facts = store.facts(name)
            evaluations += int(facts.get("evaluations", 0))
            hits, misses = hits + facts.get("cache_hits", 0), misses + facts.get("cache_misses", 0)
            if owner not in every and not name.endswith(".lst"):
                dates.append(facts.get("written", 0.0))
    done = len(dates) if ids is None else len(filed)
    share = hits / (hits + misses) if hits + misses else float("nan")
    return Status(len(runs or ()), done, failed, running, evaluations, rate(dates), share)


def rate(dates: Sequence[float], now: float | None = None) -> float:
    """Runs per hour from the dates (seconds of the epoch) they were filed at: over :data:`WINDOW`, or since the first of these runs.

    NaN for fewer than two in that time.
    """
    now = time.time() if now is None else now
    late = sorted(date for date in dates if now - WINDOW <= date <= now)
    if len(late) < 2:
        return float("nan")
    return 3600 * (len(late) - 1) / max(now - late[0], 1.0)
