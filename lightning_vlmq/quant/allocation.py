"""Which width each layer gets under a size budget: a multiple-choice knapsack, solved by dynamic programming over sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError

STATES = 400_000
"""Sizes told apart at most."""


def allocate(costs: NDArray[np.float64], sizes: NDArray[np.int64], budget: int, tolerance: float = 0.005) -> list[int]:
    """One choice per layer, of the least total cost among those whose total size is the budget's.

    Dynamic programming over total sizes in units of their greatest common divisor (Kellerer, Pferschy & Pisinger 2004, section
    11.5), which is exact. Where that makes more than :data:`STATES` sizes, they are rounded up to a unit that makes as many: the
    total is then still within the budget, and the cost the least among choices that are so after rounding.

    Args:
        costs: float64 ``[layers, choices]``, finite.
        sizes: int64 ``[layers, choices]``, positive, in any unit.
        budget: largest total size, in that unit.
        tolerance: by which share the total may stay below the budget; a cost that does not fall with size must not leave it unused.

    Returns:
        Index of the choice, by layer.

    Raises:
        VLMQError: costs that are not finite, sizes that are not positive or do not fit, or no choice within the tolerance.
    """
    if costs.ndim != 2 or costs.shape != sizes.shape or not costs.size:
        raise VLMQError(f"costs {list(costs.shape)} and sizes {list(sizes.shape)} must be one table, layers by choices")
    if not np.isfinite(costs).all() or (sizes < 1).any():
        raise VLMQError("costs must be finite and sizes positive; check the weights and the calibration data")
    unit = int(np.gcd.reduce(sizes, axis=None))
    unit = max(unit, math.ceil(budget / STATES))
    steps = -(-sizes // unit)
    capacity = budget // unit
    best = np.full(capacity + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(costs), capacity + 1), np.uint8)
    for layer, (own_costs, own_steps) in enumerate(zip(costs, steps)):
        now = np.full(capacity + 1, np.inf)
        for choice, (cost, step) in enumerate(zip(own_costs, own_steps)):
            if step > capacity:
                continue
            reached = best[: capacity + 1 - step] + cost
            better = reached < now[step:]
            now[step:][better] = reached[better]
            taken[layer, step:][better] = choice
        best = now
    least = max(0, math.ceil(budget * (1 - tolerance) / unit))  # rounding up adds less than it may fall short by
    least += 0 if (sizes % unit == 0).all() else len(costs)
    if least > capacity or not np.isfinite(best[least:]).any():
        raise VLMQError(
            f"no choice of widths has a size of {budget:,} less at most {tolerance:.1%}; the smallest is {int(sizes.min(1).sum()):,}, "
            f"the largest {int(sizes.max(1).sum()):,}"
        )
    state = least + int(best[least:].argmin())
    chosen = []
    for layer in reversed(range(len(costs))):
        chosen.append(int(taken[layer, state]))
        state -= int(steps[layer, chosen[-1]])
    return chosen[::-1]


def total(sizes: NDArray[np.int64], chosen: Sequence[int]) -> int:
    """Total size of a choice."""
    return int(sizes[np.arange(len(chosen)), list(chosen)].sum())
