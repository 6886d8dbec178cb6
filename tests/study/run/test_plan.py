"""What a plan takes for granted stands on the benchmarks' page, where it was measured."""

import re
import statistics
from pathlib import Path

import pytest

from lightning_vlmq.study.run.plan import FAKE_QUANTIZED, PASSES, STEP

PAGE = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text()


def column(line: str, place: int) -> list[float]:
    """A number of every line of the fake quantization table that begins with this: 0 is FP32's milliseconds, 2 the ratio."""
    return [float(found.split()[place]) for found in re.findall(rf"^{line}, \w+ +([\d. ]+)$", PAGE, re.M)]


def test_unit_costs_are_those_of_the_benchmarks():
    batch, images = (
        int(re.search(word, PAGE)[1]) for word in (r"batches of (\d+), 1 threads, medians", r"(\d+) images of ")
    )
    forward = statistics.median(column("forward", 0)) / 1000 / batch
    seconds = {method: float(s) for method, s in re.findall(r"^(\w+) +ours +([\d.]+) +[\d.]+x", PAGE, re.M)}
    assert set(seconds) < set(PASSES)
    for method, taken in seconds.items():
        assert PASSES[method] == pytest.approx(taken / images / forward, rel=0.1), method
    assert min(column("forward", 2)) <= FAKE_QUANTIZED <= max(column("forward", 2))
    assert pytest.approx(statistics.median(column("step", 0)) / 1000 / batch / forward, rel=0.1) == STEP
