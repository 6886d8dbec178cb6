"""The plan's unit costs are those that the benchmarks printed, as docs/benchmarks.md has them."""

import re
from pathlib import Path

import numpy as np
import pytest

from lightning_vlmq.study.run import plan
from lightning_vlmq.study.run.costs import UnitCosts
from lightning_vlmq.study.run.grid import Run

PAGE = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
FORWARD = (
    float(re.search(r"^forward, minmax +([\d.]+)", PAGE, re.M)[1]) / 32 / 1000
)  # seconds per image, full precision


def printed(pattern):
    return [[float(number) for number in found.groups()] for found in re.finditer(pattern, PAGE, re.M)]


def test_passes_of_methods():
    images = int(re.search(r"ViT-B-32, vision, (\d+) images", PAGE)[1])
    ours = dict(re.findall(r"^(\w+) +ours +([\d.]+) ", PAGE, re.M))
    found = {method: float(ours[method]) / (images * FORWARD) for method in plan.PASSES}
    assert pytest.approx(found, rel=0.02) == plan.PASSES
    assert pytest.approx(np.mean(list(plan.PASSES.values())), rel=0.02) == plan.TYPICAL


def test_noise_that_is_matched_costs_its_rounds():
    """By hand: a second an image, four pairs."""
    costs = {"vit_clean": UnitCosts(1.0, 64)}
    for method, passes in (
        ("matched_noise(seed=1)", plan.MATCHED_NOISE),
        ("matched_noise(pattern='gptq')", plan.MATCHED_NOISE + plan.PASSES["gptq"] - plan.PASSES["minmax"]),
        ("hqq", plan.TYPICAL),
    ):
        run = Run("vit_clean", "vision", method, "W4A8", "ptq", 0, method, ())
        found = plan.Plan([run], {"id": 10}, 1, 4, 1, 1, 0, 10, False).seconds(costs, "all")
        assert found["quantizing and training"] == pytest.approx(passes * 4)


def test_fake_quantized_passes_and_steps():
    ratios = printed(r"^forward, \w+ +[\d.]+ +[\d.]+ +([\d.]+)")
    assert np.mean(ratios) == pytest.approx(plan.FAKE_QUANTIZED, rel=0.02)
    steps = np.array(printed(r"^step, \w+ +([\d.]+) +([\d.]+)"))  # milliseconds a batch of 32: full precision, W8A8
    assert steps[:, 0].mean() / 32 / 1000 / FORWARD == pytest.approx(plan.STEP, rel=0.02)
    assert steps[:, 1].mean() / 32 / 1000 / FORWARD == pytest.approx(plan.STEP * plan.FAKE_QUANTIZED, rel=0.02)


def test_bytes_of_rows_and_samples():
    ((row, rows),) = printed(r"^([\d.]+) bytes a row, ([\d.]+) rows a set and model")
    ((sample,),) = printed(r"^([\d.]+) bytes a sample")
    assert pytest.approx((row, rows, sample), rel=0.02) == (plan.ROW_BYTES, plan.ROWS_A_SET, plan.SAMPLE_BYTES)
