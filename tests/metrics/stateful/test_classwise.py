"""The streamed gaps against the class-wise error of all probabilities, its standard error against the bootstrap's."""

import numpy as np
import pytest
import torch

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.classwise import MIN_SAMPLES_PER_CLASS, classwise_estimates
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.evaluation.records import EvaluationSet
from lightning_vlmq.evaluation.rows import rows_of
from lightning_vlmq.metrics.functional import gap_variances
from lightning_vlmq.statistics import Statistics

C = 6
SET = EvaluationSet("a", "id", "", 0)
ECE, DEBIASED = Measure("classwise_ece", "id"), Measure("classwise_ece_debiased", "id")


def batch(n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, C, generator=generator)
    target = torch.multinomial((0.6 * logits).softmax(-1), 1, generator=generator).squeeze(1)
    return torch.randperm(n, generator=generator), logits, target


def gaps(index, logits, target, **settings):
    metric = m.ClasswiseGaps(C, **settings)
    metric.update(index, logits, target)
    return metric.compute()


def test_sums_are_those_of_all_probabilities():
    index, logits, target = batch(230, 0)
    metric = m.ClasswiseGaps(C, n_bins=8, n_groups=7)
    for part in (slice(0, 100), slice(100, 101), slice(101, 230)):
        metric.update(index[part], logits[part], target[part])
    found, probs = metric.compute(), logits.softmax(-1)
    for group in range(7):
        own = index % 7 == group
        assert found["count"][group] == own.sum()
        error = found["gap"][group].abs().sum(-1).mean() / own.sum()
        torch.testing.assert_close(error, m.classwise_ece(probs[own], target[own], 8), atol=1e-12, rtol=0)
    for k in range(C):
        columns = m.functional.bin_gaps(probs[:, k], target == k, 8)
        torch.testing.assert_close(found["variance"][k], gap_variances(columns) * 230**2, atol=1e-9, rtol=0)


def test_estimates_are_the_errors_and_rows_their_changes():
    (mine, theirs), settings = (gaps(*batch(900, seed)) for seed in (1, 2)), Statistics()
    found = classwise_estimates([SET], {"a": [theirs, mine]}, settings)
    expected = [
        float(m.classwise_ece(logits.softmax(-1), target)) for _, logits, target in (batch(900, 2), batch(900, 1))
    ]
    np.testing.assert_allclose(found[ECE].value, expected, atol=1e-12)
    rows = {(r.dataset, r.metric): r for r in rows_of(found, 1, True)}
    assert rows["", "delta_classwise_ece"].value == pytest.approx(1 - expected[1] / expected[0])
    assert rows["", "delta_classwise_ece_debiased"].value == pytest.approx(np.subtract(*found[DEBIASED].value[::-1]))
    assert rows["a", "classwise_ece"].value == rows["", "classwise_ece"].value
    assert all(row.stderr > 0 and row.n == 900 for row in rows.values())


def test_standard_error_is_the_bootstrap_s():
    index, logits, target = batch(3000, 1)
    found = classwise_estimates([SET], {"a": [gaps(index, logits, target, n_groups=60)]}, Statistics(n_groups=60))
    probs = logits.softmax(-1)
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(3000, (3000,), generator=generator) for _ in range(200)]
    spread = torch.stack([m.classwise_ece(probs[i], target[i]) for i in drawn]).std()
    assert found[ECE].replicates[:, 0].std(ddof=1) == pytest.approx(float(spread), rel=0.35)


def test_few_samples_a_class_have_no_debiased_error():
    few, enough = (
        classwise_estimates([SET], {"a": [gaps(*batch(n * C, 3))]}, Statistics())
        for n in (MIN_SAMPLES_PER_CLASS - 1, MIN_SAMPLES_PER_CLASS)
    )
    assert np.isnan(few[DEBIASED].value).all() and not np.isnan(few[ECE].value).any()
    assert np.isfinite(enough[DEBIASED].value).all()


def test_broken_samples_and_those_without_a_class():
    metric = m.ClasswiseGaps(C)
    index, logits, target = batch(1, 3)
    metric.update(index, logits, target)
    value = float(metric.compute()["gap"].sum(0).abs().sum(-1).mean())
    assert value == pytest.approx(float(m.classwise_ece(logits.softmax(-1), target)))
    metric.update(index + 1, logits * torch.nan, target - target - 1)  # without a class: it changes nothing
    assert metric.compute()["gap"].isfinite().all()
    metric.update(index + 1, logits * torch.nan, target)
    assert np.isnan(classwise_estimates([SET], {"a": [metric.compute()]}, Statistics())[ECE].value).all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.ClasswiseGaps(0), "num_classes"),
        (lambda: m.ClasswiseGaps(3, n_groups=1), "n_groups"),
        (lambda: m.ClasswiseGaps(3).update(torch.arange(2), torch.zeros(2, 4), torch.zeros(2).long()), r"\[n, 3\]"),
        (lambda: m.ClasswiseGaps(3).update(torch.arange(1), torch.zeros(2, 3), torch.zeros(2).long()), "index"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
