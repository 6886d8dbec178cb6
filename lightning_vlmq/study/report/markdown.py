"""The part of a committed Markdown page that a study's results are written into, and where and in what time they were made."""

from __future__ import annotations

import os
import platform
from datetime import timedelta
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.study.analysis.runs import StudyResults


def markers(part: str = "results") -> tuple[str, str]:
    """The lines that a part of a page stands between."""
    return f"<!-- {part} -->", f"<!-- end of {part} -->"


START, END = markers()


def around_results(page: Path, part: str = "results") -> tuple[str, str]:
    """A page's text before and after its results, or another part that :func:`markers` stand around.

    Raises:
        VLMQError: the page has not one of each marker.
    """
    text = page.read_text(encoding="utf-8")
    start, end = markers(part)
    if text.count(start) != 1 or text.count(end) != 1:
        raise VLMQError(f"'{page}' has no place for {part}; put {start} and {end} on lines of their own")
    return text.split(start)[0], text.split(end)[1]


def hardware() -> str:
    """This machine's processor and number of cores."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def worked(results: StudyResults) -> timedelta:
    """Time that the runs took together, one after another, as each was timed; pauses between them do not count."""
    facts = [run.store.facts(run.run_id) for run in results.runs if not run.key.is_tuned]
    return timedelta(seconds=round(sum(own.get("seconds", 0.0) for own in facts)))


def code_of(results: StudyResults) -> str:
    """The versions of the package that made the runs, with their commits where it ran from a checkout."""
    return ", ".join(f"`{version}`" for version in sorted(map(str, results.rows["code_version"].unique())))
