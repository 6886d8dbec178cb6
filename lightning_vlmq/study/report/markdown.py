"""The part of a committed Markdown page that a study's results are written into, and where they were made."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from lightning_vlmq.core.errors import VLMQError

START, END = "<!-- results -->", "<!-- end of results -->"


def around_results(page: Path) -> tuple[str, str]:
    """A page's text before and after its results.

    Raises:
        VLMQError: the page has not one of each marker.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise VLMQError(f"'{page}' has no place for results; put {START} and {END} on lines of their own")
    return text.split(START)[0], text.split(END)[1]


def hardware() -> str:
    """This machine's processor and number of cores."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"
