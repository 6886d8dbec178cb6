"""What figures show beyond single numbers, of made-up samples."""

import numpy as np
import pytest

from lightning_vlmq.evaluation.records import EvaluationSet, SampleMatrix
from lightning_vlmq.study.analysis.diagnostics import diagnose

N = 400


@pytest.mark.parametrize("wrong", [0, 40, N])
def test_the_band_of_an_accuracy_has_a_width_even_where_all_are_alike(wrong):
    correct = np.arange(N) >= wrong
    table = {"index": np.arange(N), "correct": correct, "prediction": np.zeros(N, int), "confidence": np.full(N, 0.5)}
    found = diagnose({"id": [SampleMatrix(EvaluationSet("a", "id", "", 0), {0: table}, 1)]}, 0, 15)
    assert found.clean.value == correct.mean() and found.flips["unchanged"] == 1
    binomial = correct.std() / N**0.5
    assert found.clean.stderr == pytest.approx(binomial if 0 < wrong < N else 1 / (N + 2))
