"""Metrics from resample counts equal the metrics of scikit-learn and of the package on resampled samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import functional
from lightning_vlmq.statistics.replicates import (
    RankingMetrics,
    SelectiveMetrics,
    ranking_metrics,
    resample_counts,
    selective_metrics,
)


def draw(n_id: int, n_ood: int, digits: int | None, seed: int = 0):
    rng = np.random.default_rng(seed)
    id_scores = rng.normal(0.8, 1, n_id).astype(np.float32)
    ood_scores = rng.normal(0, 1, n_ood).astype(np.float32)
    return (id_scores, ood_scores) if digits is None else (id_scores.round(digits), ood_scores.round(digits))


@pytest.mark.parametrize("digits", [None, 1, 0])
@pytest.mark.parametrize(("n_id", "n_ood"), [(120, 70), (33, 140), (1, 5), (4, 1)])
def test_equal_to_resampling_the_scores(n_id, n_ood, digits):
    id_scores, ood_scores = draw(n_id, n_ood, digits)
    id_counts, ood_counts = resample_counts(n_id, 70, seed=1), resample_counts(n_ood, 70, seed=2)
    found = ranking_metrics(id_scores, ood_scores, id_counts, ood_counts)
    for name in RankingMetrics._fields:
        expected = [
            float(
                getattr(functional, name)(
                    torch.from_numpy(np.repeat(id_scores, id_counts[:, r].astype(int))),
                    torch.from_numpy(np.repeat(ood_scores, ood_counts[:, r].astype(int))),
                )
            )
            for r in range(70)
        ]
        np.testing.assert_allclose(getattr(found, name), expected, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("digits", [None, 1])
def test_equal_to_scikit_learn_with_sample_weights(digits):
    id_scores, ood_scores = draw(90, 60, digits, seed=3)
    id_counts, ood_counts = resample_counts(90, 5, seed=4), resample_counts(60, 5, seed=5)
    found = ranking_metrics(id_scores, ood_scores, id_counts, ood_counts)
    scores, is_id = np.concatenate([id_scores, ood_scores]), np.repeat([1, 0], [90, 60])
    for r in range(5):
        weights = np.concatenate([id_counts[:, r], ood_counts[:, r]])
        aupr_in = average_precision_score(is_id, scores, sample_weight=weights)
        assert found.aupr_in[r] == pytest.approx(aupr_in, abs=3e-6)
        aupr_out = average_precision_score(1 - is_id, -scores, sample_weight=weights)
        assert found.aupr_out[r] == pytest.approx(aupr_out, abs=3e-6)


def test_counts_are_resamples_and_repeat():
    counts = resample_counts(50, 30, seed=7)
    assert counts.shape == (50, 30) and (counts.sum(0) == 50).all() and (counts >= 0).all()
    assert (counts == resample_counts(50, 30, seed=7)).all()
    for other in (resample_counts(50, 30, seed=8), resample_counts(50, 30, seed=7, stream=1)):
        assert not (counts == other).all()
    assert counts[:, 0].std() == pytest.approx(1, abs=0.4)  # multinomial: variance 1 - 1/n


def test_nan_makes_everything_undefined():
    id_scores, ood_scores = draw(9, 9, None)
    ood_scores[3] = np.nan
    counts = resample_counts(9, 4, seed=0)
    assert all(np.isnan(values).all() for values in ranking_metrics(id_scores, ood_scores, counts, counts))


def test_misfits_are_refused():
    id_scores, ood_scores = draw(9, 5, None)
    counts = resample_counts(9, 4, seed=0)
    with pytest.raises(VLMQError, match="one count per score"):
        ranking_metrics(id_scores, ood_scores, counts, counts)
    with pytest.raises(VLMQError, match="at least one"):
        ranking_metrics(id_scores, ood_scores[:0], counts, np.empty((0, 4), dtype=np.float32))


def samples(n: int, digits: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1, n).astype(np.float32)
    return (confidence if digits is None else confidence.round(digits)), rng.random(n) < 0.7 * confidence


@pytest.mark.parametrize("digits", [None, 2, 1, 0])
@pytest.mark.parametrize("n", [200, 31, 9, 1])
def test_selective_metrics_are_those_of_the_resampled_samples(n, digits):
    confidence, correct = samples(n, digits, seed=n)
    counts = resample_counts(n, 80, seed=3)  # more than one chunk
    found = selective_metrics(confidence, correct, counts, risk=0.2)
    functions = {
        "aurc": functional.aurc,
        "augrc": functional.augrc,
        "coverage_at_risk": lambda c, k: functional.coverage_at_risk(c, k, risk=0.2),
    }
    assert tuple(functions) == SelectiveMetrics._fields
    drawn = [torch.from_numpy(np.repeat(np.arange(n), counts[:, r].astype(int))) for r in range(80)]
    for name, function in functions.items():
        expected = [float(function(torch.from_numpy(confidence)[i], torch.from_numpy(correct)[i])) for i in drawn]
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-9, err_msg=name)


def test_undefined_confidences_and_misfits():
    counts = resample_counts(5, 4, seed=0)
    confidence, correct = samples(5, None, seed=0)
    confidence[2] = np.nan
    found = selective_metrics(confidence, correct, counts, risk=0.05)
    assert all(np.isnan(values).all() and len(values) == 4 for values in found)
    with pytest.raises(VLMQError, match="one correctness and one count each"):
        selective_metrics(confidence[:4], correct[:4], counts, risk=0.05)
    with pytest.raises(VLMQError, match="need samples"):
        selective_metrics(confidence[:0], correct[:0], counts[:0], risk=0.05)
