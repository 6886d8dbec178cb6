"""Mean corruption error against its closed form, term by term."""

import numpy as np
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    mean_corruption_error,
    relative_mean_corruption_error,
)


def closed_form(errors, baseline, clean=0.0, baseline_clean=0.0):
    """Hendrycks & Dietterich 2019, section 4.1, written out."""
    ratios = []
    for mine, theirs in zip(errors, baseline):
        ratios.append(sum(e - clean for e in mine) / sum(b - baseline_clean for b in theirs))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("shape", [(15, 5), (3, 2), (1, 1)])
def test_closed_form(shape):
    errors, baseline = torch.rand(2, *shape, dtype=torch.float64) * 0.5 + 0.4
    clean, baseline_clean = 0.2, 0.3
    assert float(mean_corruption_error(errors, baseline)) == pytest.approx(closed_form(errors, baseline))
    expected = closed_form(errors, baseline, clean, baseline_clean)
    assert float(relative_mean_corruption_error(errors, baseline, clean, baseline_clean)) == pytest.approx(expected)


def test_leading_dimensions_are_independent():
    errors, baseline = torch.rand(2, 7, 4, 5) + 0.5
    clean, baseline_clean = torch.rand(2, 7) * 0.4
    values = relative_mean_corruption_error(errors, baseline, clean, baseline_clean)
    single = relative_mean_corruption_error(errors[3], baseline[3], clean[3], baseline_clean[3])
    assert values.shape == (7,) and float(values[3]) == pytest.approx(float(single))
    assert torch.allclose(mean_corruption_error(errors, baseline[3])[3], mean_corruption_error(errors[3], baseline[3]))


def test_baseline_itself_is_one():
    errors = torch.rand(4, 5) + 0.5
    assert float(mean_corruption_error(errors, errors)) == pytest.approx(1)
    assert float(relative_mean_corruption_error(errors, errors, 0.1, 0.1)) == pytest.approx(1)


def test_mean_over_severities_stands_for_all_of_them():
    errors, baseline = torch.rand(2, 6, 5, dtype=torch.float64) + 0.2
    mean = baseline.mean(1, keepdim=True)
    assert float(mean_corruption_error(errors, mean)) == pytest.approx(float(mean_corruption_error(errors, baseline)))


def test_half_of_alexnets_errors_is_one_half():
    errors = torch.tensor(list(ALEXNET_ERRORS.values())).double()
    assert len(errors) == 15 and 0.4 < ALEXNET_CLEAN_ERROR < 0.45
    assert float(mean_corruption_error(errors[:, None].expand(15, 5) / 2, errors[:, None])) == pytest.approx(0.5)


def test_a_baseline_without_errors_is_no_number():
    zero = torch.zeros(2, 3)
    assert mean_corruption_error(torch.ones(2, 3), zero).isnan()
    assert torch.isnan(mean_corruption_error(zero, zero))
    assert np.isnan(float(relative_mean_corruption_error(zero + 0.25, zero + 0.25, 0.25, 0.25)))


def test_bad_shapes():
    for shape in ((5,), (0, 5), (3, 0)):
        with pytest.raises(VLMQError, match="corruptions, severities"):
            mean_corruption_error(torch.rand(shape), torch.rand(shape))
