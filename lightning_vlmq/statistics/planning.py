"""How many samples it takes to see a change of a given size."""

from __future__ import annotations

import math

from scipy.stats import norm

from lightning_vlmq.core.errors import VLMQError


def samples_needed(stderr: float, n: int, change: float, power: float = 0.8, level: float = 0.05) -> float:
    """Samples with which a two-sided z-test finds a change of this size, from the standard error that ``n`` of them have.

    A standard error falls with the root of the number of samples (the same mixture of sets and classes is meant), and the test
    finds a change d with the chance ``power`` where ``d = (z_{1-level/2} + z_power) stderr`` (Cohen 1988, chapter 2; the other tail's
    share is left out)::

        n_needed = n ((z_{1-level/2} + z_power) stderr / d)^2

    Args:
        stderr: standard error of the measured change at ``n`` samples, in the unit of ``change``; 0 where every sample agrees.
        n: samples behind it.
        change: the change to be seen, not 0; its sign does not matter.
        power: chance to find it, in (0, 1).
        level: chance to find one where there is none, in (0, 1).

    Returns:
        A whole number of at least 2, as a float; NaN where the standard error is.

    Raises:
        VLMQError: a value is out of range.
    """
    if not (0 < power < 1 and 0 < level < 1):
        raise VLMQError(f"power and level are chances between 0 and 1, got {power} and {level}")
    if n < 1 or not change or not math.isfinite(change) or stderr < 0:
        raise VLMQError(f"need n >= 1, a change other than 0 and a standard error >= 0, got {n}, {change} and {stderr}")
    if math.isnan(stderr):
        return math.nan
    factor = float(norm.isf(level / 2) + norm.isf(1 - power)) * stderr / abs(change)
    return max(2.0, float(math.ceil(n * factor**2)))
