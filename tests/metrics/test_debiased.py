"""Debiased calibration errors: their bias by quadrature, their parts against the plug-in error; signed error, AUGRC, placements."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import (
    augrc,
    bias_doubt,
    bin_gaps,
    calibration_error,
    debiased_error,
    debiased_magnitude,
    gap_variances,
    placements,
    remaining_bias,
    signed_calibration_error,
)


def test_the_magnitude_is_nearly_unbiased_wherever_the_truth_lies():
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    for truth in np.linspace(0, 6, 61):
        weight = torch.from_numpy(norm.pdf(x - truth))
        weight /= weight.sum()
        mean = float((weight * debiased_magnitude(x)).sum())
        spread = float((weight * debiased_magnitude(x).square()).sum() - mean**2) ** 0.5
        assert abs(mean - truth) <= 0.1515 and spread < 1.81
    assert torch.equal(debiased_magnitude(x), debiased_magnitude(-x))
    assert float(debiased_magnitude(torch.tensor(40.0))) == 40


def test_the_remaining_bias_by_quadrature():
    x = torch.linspace(-14, 14, 28_001, dtype=torch.float64)
    for truth in (0.0, 0.2, 0.5, 1.3, 4.0):
        weight = torch.from_numpy(norm.pdf(x - truth))
        mean = float((weight * debiased_magnitude(x)).sum() / weight.sum())
        assert float(remaining_bias(torch.tensor(truth, dtype=torch.float64))) == pytest.approx(mean - truth, abs=1e-6)


@pytest.mark.parametrize("closeness", [0.0, 0.1, 1.0])
def test_the_doubt_bounds_what_the_bias_of_a_change_can_be(closeness):
    rng = np.random.default_rng(3)
    for _ in range(20):
        deviations = torch.from_numpy(rng.uniform(0.001, 0.01, (2, 15)))
        true = torch.from_numpy(rng.normal(0, 2, (2, 15)))
        true[1], deviations[1] = (
            mine[0] + closeness * (mine[1] - mine[0]) for mine in (true, deviations)
        )  # from equal to unrelated models
        bias = (deviations * remaining_bias(true)).sum(1)
        f, q = ((deviations[k] * true[k], deviations[k].square()) for k in (0, 1))
        doubt = float(bias_doubt(*f, *q))
        assert abs(float(bias[1] - bias[0])) <= 3**0.5 * doubt + 1e-12
        assert float(bias_doubt(*q, *f)) == pytest.approx(doubt) and (closeness > 0) == (doubt > 0)
    far = torch.full((15,), 0.1, dtype=torch.float64), torch.full((15,), 1e-4, dtype=torch.float64)
    assert float(bias_doubt(far[0], far[1], far[0] + 0.01, far[1])) < 1e-4  # gaps that are far from 0 have no bias
    empty = torch.zeros(15, dtype=torch.float64)
    assert float(bias_doubt(empty, empty, empty, empty)) == 0


def samples(n, digits=None):
    rng = np.random.default_rng(n)
    confidence = rng.beta(3, 1, n).astype(np.float32)
    confidence = confidence if digits is None else confidence.round(digits)
    return torch.from_numpy(confidence), torch.from_numpy(rng.random(n) < 0.7 * confidence)


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("digits", [None, 2, 1, 0])
@pytest.mark.parametrize("n", [200, 31, 9, 1])
def test_gaps_add_up_to_the_error(n, digits, binning):
    confidence, correct = samples(n, digits)
    gaps = bin_gaps(confidence, correct, 15, binning)
    error = calibration_error(confidence, correct, 15, binning=binning)
    torch.testing.assert_close(gaps.mean(0).abs().sum(), error, atol=1e-9, rtol=0)
    shuffled = torch.randperm(n)
    again = bin_gaps(confidence[shuffled], correct[shuffled], 15, binning).mean(0).abs().sum()
    torch.testing.assert_close(again, error, atol=1e-9, rtol=0)


def test_confidences_on_the_edges_of_bins_stay_on_their_side():
    confidence = torch.linspace(0, 1, 16)  # float32, as the metric's own edges
    gaps = bin_gaps(confidence, torch.zeros(16, dtype=torch.bool))
    assert [int(row.abs().argmax()) for row in gaps[1:]] == list(range(1, 16))


def test_variances_are_those_of_the_means():
    confidence, correct = samples(4000)
    gaps = bin_gaps(confidence, correct)
    direct = gaps.var(0, correction=0) / 4000
    used = gaps.abs().sum(0) > 0
    torch.testing.assert_close(gap_variances(gaps)[used], direct[used], rtol=0.15, atol=1e-9)
    alone = gap_variances(bin_gaps(torch.tensor([0.8]), torch.tensor([True])))
    assert float(alone.sum()) == pytest.approx(0.2**2 + 0.8 * 0.2)  # right once: not without doubt


def test_a_large_error_is_left_as_it_is_and_none_is_about_zero():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        confidence = torch.from_numpy(rng.uniform(0.1, 1, 800).astype(np.float32))
        gaps = bin_gaps(confidence, torch.from_numpy(rng.random(800) < confidence.numpy()))
        found.append([float(gaps.mean(0).abs().sum()), float(debiased_error(gaps.mean(0), gap_variances(gaps)))])
    plugged, debiased = np.mean(found, 0)
    assert plugged > 0.04 and abs(debiased) < 0.25 * plugged
    gaps = bin_gaps(torch.full((800,), 0.9), torch.arange(800) % 2 == 0)
    assert float(debiased_error(gaps.mean(0), gap_variances(gaps))) == pytest.approx(0.4, abs=1e-6)
    assert float(debiased_error(torch.tensor([0.2, 0.0]), torch.zeros(2))) == pytest.approx(
        0.2
    )  # without doubt, as it is


def test_signed_error_is_the_sum_over_any_bins():
    confidence, correct = samples(500)
    expected = confidence.double().mean() - correct.double().mean()
    assert float(signed_calibration_error(confidence, correct)) == pytest.approx(float(expected))
    assert float(-bin_gaps(confidence, correct).mean(0).sum()) == pytest.approx(float(expected))


@pytest.mark.parametrize("digits", [None, 2, 1, 0])
def test_augrc_is_the_area_and_traub_s_closed_form(digits):
    confidence, correct = samples(3000, digits)
    value = float(augrc(confidence, correct))
    right = correct.double().mean().item()
    separation = roc_auc_score(correct.numpy(), confidence.numpy())
    assert value == pytest.approx((1 - separation) * right * (1 - right) + (1 - right) ** 2 / 2, abs=1 / 3000)
    if digits is None:
        errors = (~correct[confidence.argsort(descending=True)]).double().cumsum(0) / 3000
        assert value == pytest.approx(float(errors.mean()))
    assert np.isnan(float(augrc(confidence[:0], correct[:0])))


def test_placements_average_to_the_auroc_and_are_pairwise_shares():
    rng = np.random.default_rng(1)
    inside, outside = (torch.from_numpy(rng.normal(shift, 1, n).round(1)) for shift, n in ((1, 70), (0, 50)))
    below, above = placements(inside, outside)
    pairs = (inside[:, None] > outside).double() + (inside[:, None] == outside).double() / 2
    torch.testing.assert_close(below, pairs.mean(1))
    torch.testing.assert_close(above, pairs.mean(0))
    inside[3] = torch.nan
    assert all(part.isnan().all() for part in placements(inside, outside))


def test_bad_input():
    with pytest.raises(VLMQError, match="binning"):
        bin_gaps(torch.rand(5), torch.ones(5).bool(), binning="wide")
    with pytest.raises(VLMQError, match=r"\[n\]"):
        bin_gaps(torch.rand(5, 2), torch.ones(5, 2).bool())
    with pytest.raises(VLMQError, match="n_bins"):
        bin_gaps(torch.rand(5), torch.ones(5).bool(), 0)
