"""The headline's intervals and tests, against closed forms and simulation."""

import numpy as np
import pytest

from lightning_vlmq.evaluation.headline import headline, side_by_side
from lightning_vlmq.evaluation.records import EvaluationSet
from lightning_vlmq.statistics import Statistics

WHERE = EvaluationSet("photos", "id", "", 0)


def columns(correct, confidence):
    n = len(correct)
    return {
        "index": np.arange(n),
        "target": np.zeros(n, np.int64),
        "prediction": (~correct).astype(np.int64),
        "confidence": confidence.astype(np.float32),
        "correct": correct,
        "correct_top5": np.ones(n, bool),
        "nll": -np.log(confidence).astype(np.float32),
        "brier": ((1 - confidence) ** 2).astype(np.float32),
    }


def runs(rng, n, worse):
    """Two runs on the same samples, the second right ``worse`` less often."""
    first = rng.random(n) < 0.8
    second = first & (rng.random(n) >= worse)
    confidence = rng.uniform(0.5, 1, n)
    return [{WHERE: columns(first, confidence)}, {WHERE: columns(second, confidence)}]


def test_the_change_of_accuracy_has_the_error_of_paired_differences():
    first, second = runs(np.random.default_rng(0), 2000, 0.03)
    line = next(
        line for line in headline(side_by_side([first, second]), Statistics()) if line.dimension.title == "Accuracy"
    )
    difference = second[WHERE]["correct"].astype(float) - first[WHERE]["correct"]
    assert line.change == pytest.approx(difference.mean())
    assert line.half_width == pytest.approx(1.96 * difference.std(ddof=1) / 2000**0.5, rel=0.1)
    assert line.is_significant and not line.is_better


def test_a_run_beside_itself_has_not_changed():
    first, _ = runs(np.random.default_rng(1), 200, 0.0)
    accuracy, calibration = headline(side_by_side([first, first]), Statistics())
    assert accuracy.change == calibration.change == calibration.half_width == 0
    assert accuracy.half_width == pytest.approx(1.96 / 202, rel=1e-3)  # that none of 200 flips is no proof
    assert not accuracy.is_significant and not calibration.is_significant


def test_one_run_has_values_alone():
    first, _ = runs(np.random.default_rng(2), 50, 0.0)
    lines = headline(side_by_side([first]), Statistics())
    assert [line.dimension.title for line in lines] == ["Accuracy", "Calibration"]
    assert all(len(line.values) == 1 and np.isnan(line.change) and not line.is_significant for line in lines)


def test_sets_that_one_run_lacks_are_left_out():
    first, second = runs(np.random.default_rng(3), 50, 0.0)
    assert not headline(side_by_side([first, {EvaluationSet("others", "id", "", 0): second[WHERE]}]), Statistics())


def test_no_change_is_seldom_called_one():
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(60):
        first = rng.random(300) < 0.8
        swapped = rng.random(300) < 0.1  # as often to the better as to the worse
        second = np.where(swapped, rng.random(300) < 0.8, first)
        confidence = rng.uniform(0.5, 1, 300)
        lines = headline(
            side_by_side([{WHERE: columns(first, confidence)}, {WHERE: columns(second, confidence)}]), Statistics()
        )
        found += lines[0].is_significant
    assert found <= 9  # 3 expected of 60 at 5 %; 10 or more happens once in a thousand
