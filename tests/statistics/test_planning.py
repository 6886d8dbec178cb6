"""The number of samples that a change takes, against a simulation and against scipy's normal distribution."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.statistics import samples_needed


@pytest.mark.parametrize(("power", "change"), [(0.8, 0.02), (0.9, 0.03), (0.5, -0.04)])
def test_with_that_many_the_change_is_found_that_often(power, change):
    """Accuracies of two models that differ by ``change`` on paired images; planned from one pilot's standard error."""
    rng = np.random.default_rng(int(1000 * power))
    up, down = (0.06 + abs(change), 0.06) if change > 0 else (0.06, 0.06 + abs(change))
    spread = math.sqrt(up + down - change**2)
    n = int(samples_needed(spread / math.sqrt(700), 700, change, power))
    steps = rng.choice([1.0, -1.0, 0.0], p=[up, down, 1 - up - down], size=(4000, n))
    z = steps.mean(1) / (steps.std(1) / math.sqrt(n))
    found = (np.abs(z) > norm.isf(0.025)).mean()
    assert found == pytest.approx(power, abs=3.5 * math.sqrt(power * (1 - power) / 4000) + 0.01)


def test_four_times_the_images_for_half_the_change():
    first, second = samples_needed(0.003, 4000, 0.01), samples_needed(0.003, 4000, 0.005)
    assert second == pytest.approx(4 * first, rel=1e-3)
    assert samples_needed(0.003, 4000, 0.003 * (norm.isf(0.025) + norm.isf(0.2))) == pytest.approx(4000, abs=1)


def test_edges():
    assert samples_needed(0.0, 10, 0.1) == 2 and math.isnan(samples_needed(math.nan, 10, 0.1))
    for bad in ({"change": 0.0}, {"n": 0}, {"stderr": -1.0}, {"power": 1.0}, {"level": 0.0}, {"change": math.nan}):
        with pytest.raises(VLMQError):
            samples_needed(**({"stderr": 0.1, "n": 10, "change": 0.1} | bad))
