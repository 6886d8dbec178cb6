import itertools

import numpy as np
import pytest

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import allocation
from lightning_vlmq.quant.allocation import allocate, total

BITS = np.array([2, 3, 4, 6, 8])


def brute_force(costs, sizes, budget, tolerance):
    best = None
    for chosen in itertools.product(range(costs.shape[1]), repeat=len(costs)):
        size = total(sizes, chosen)
        if budget * (1 - tolerance) <= size <= budget:
            cost = sum(costs[layer, choice] for layer, choice in enumerate(chosen))
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tolerance", [0.02, 0.2, 1.0])
def test_it_is_the_best_of_all_choices(seed, tolerance):
    """Costs need not fall with size, and sizes share no large divisor."""
    draw = np.random.default_rng(seed)
    numbers = draw.integers(5, 60, 6)
    sizes = numbers[:, None] * BITS
    costs = draw.exponential(size=sizes.shape) * (4.0**-BITS if seed % 2 else 1.0)
    budget = 4 * int(numbers.sum())
    chosen = allocate(costs, sizes, budget, tolerance)
    assert budget * (1 - tolerance) <= total(sizes, chosen) <= budget
    own = costs[np.arange(6), chosen].sum()
    assert own == pytest.approx(brute_force(costs, sizes, budget, tolerance), rel=1e-12)


def test_rounded_sizes_stay_within_the_budget_and_near_the_best(monkeypatch):
    draw = np.random.default_rng(0)
    numbers = draw.integers(10_000, 3_000_000, 40)
    sizes, costs = numbers[:, None] * BITS, draw.exponential(size=(40, 5)) * 4.0**-BITS
    budget = 4 * int(numbers.sum())
    exact = costs[np.arange(40), allocate(costs, sizes, budget)].sum()  # 400,000 sizes
    monkeypatch.setattr(allocation, "STATES", 40_000)
    chosen = allocate(costs, sizes, budget)
    assert 0.995 * budget <= total(sizes, chosen) <= budget
    assert costs[np.arange(40), chosen].sum() <= exact * 1.005


def test_what_has_no_choice_is_refused():
    sizes = np.array([[8, 12], [8, 12]])
    with pytest.raises(VLMQError, match="smallest is 16, the largest 24"):
        allocate(np.ones((2, 2)), sizes, 15)
    with pytest.raises(VLMQError, match="no choice of widths"):  # 24 is 4 % short of it
        allocate(np.ones((2, 2)), sizes, 25)
    with pytest.raises(VLMQError, match="finite"):
        allocate(np.full((2, 2), np.nan), sizes, 20)
    with pytest.raises(VLMQError, match="one table"):
        allocate(np.ones((2, 3)), sizes, 20)
