import math

import numpy as np
import pytest
from scipy.stats import norm, permutation_test, spearmanr, ttest_1samp
from scipy.stats import t as student

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.statistics.equivalence import over_seeds, reproduction, sign_flip_p, stratified_association

RNG = np.random.default_rng(0)


def drawn(mean, spread, n=4000, shared=0.0):
    return mean + spread * RNG.normal(size=n) + shared


@pytest.mark.parametrize("sign", [1, -1])
def test_clear_cases(sign):
    common = RNG.normal(size=4000) * 0.3
    q = drawn(10 * sign, 0.2) + common
    cases = {"reproduces": 10.5, "does not": 1.0}
    for verdict, control in cases.items():
        found = reproduction(10 * sign, q, control * sign, drawn(control * sign, 0.2) + common)
        assert found.verdict == verdict
        assert found.low < found.ratio < found.high and found.ratio == pytest.approx(control / 10)
    assert reproduction(10 * sign, q, 25 * sign, drawn(25 * sign, 0.2)).verdict == "does not"  # too much is no match
    assert reproduction(10 * sign, q, -10 * sign, drawn(-10 * sign, 0.2)).verdict == "does not"
    assert reproduction(10 * sign, q, 5 * sign, drawn(5 * sign, 2.0)).verdict == "undecided"
    assert reproduction(0.1 * sign, drawn(0.1 * sign, 1.0), 3, drawn(3, 1.0)).verdict == "nothing to reproduce"


def test_one_sided_errors_keep_their_level():
    wrong = 0
    for _ in range(400):  # the truth is on the edge: half of the change
        q, c = 10 + RNG.normal(), 5 + RNG.normal()
        found = reproduction(q, q + RNG.normal(size=500), c, c + RNG.normal(size=500))
        wrong += found.verdict == "reproduces"
    assert wrong / 400 < 0.09  # 5 % claimed


def test_seeds_add_their_spread():
    samples = RNG.normal(size=(3000, 1))
    seeds = np.array([[0.0, 2.0, 4.0, 6.0, 8.0]])
    found = over_seeds(samples + seeds)
    assert found.mean() == pytest.approx(4, abs=0.15)
    wider = student.ppf(0.95, 4) / norm.ppf(0.95)
    assert found.var() == pytest.approx(1 + wider**2 * seeds.var(ddof=1) / 5, rel=0.1)
    assert np.array_equal(over_seeds(samples), samples[:, 0])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_one_sided_bounds_of_a_mean_over_seeds_keep_their_level(n):
    """Of many draws of n seeds alone, the bounds at 5 and 95 % miss the mean of all seeds as often as they say."""
    drawn = RNG.normal(0, 3, (1500, n))
    found = [np.quantile(over_seeds(np.tile(seeds, (400, 1)), k), (0.05, 0.95)) for k, seeds in enumerate(drawn)]
    missed = np.mean([[low > 0, high < 0] for low, high in found], axis=0)
    # of two seeds a resample is one of three means, whose extremes bound it
    assert (missed < 0.075).all() and missed.sum() > 0.03


def test_degenerate_reproductions():
    assert reproduction(math.nan, drawn(0, 1), 1, drawn(0, 1)).verdict == "undecided"
    assert reproduction(0.0, np.zeros(10), 0.0, np.zeros(10)).verdict == "nothing to reproduce"
    exact = reproduction(2.0, np.full(10, 2.0), 2.0, np.full(10, 2.0))
    assert exact.verdict == "reproduces" and (exact.low, exact.high) == (1, 1)
    with pytest.raises(VLMQError):
        reproduction(1, np.zeros(3), 1, np.zeros(4))
    with pytest.raises(VLMQError):
        reproduction(1, np.zeros(3), 1, np.zeros(3), share=1.5)


def test_association_is_the_mean_of_spearmans_inside_strata():
    clusters, strata = np.repeat(["a", "b", "c"], 20), np.tile(np.repeat(["W4", "W8"], 10), 3)
    x, y = RNG.normal(size=60), RNG.normal(size=60)
    found = stratified_association(x, y, clusters, strata)
    by_cluster = [
        np.mean(
            [spearmanr(x[(clusters == c) & (strata == s)], y[(clusters == c) & (strata == s)])[0] for s in ("W4", "W8")]
        )
        for c in "abc"
    ]
    assert found.rho == pytest.approx(np.mean(by_cluster))
    assert found.left_out_low == pytest.approx(min(np.mean(np.delete(by_cluster, k)) for k in range(3)))
    assert (found.n_clusters, found.n) == (3, 60)


def test_what_differs_between_strata_is_no_relation():
    clusters = np.repeat([f"m{k}" for k in range(8)], 12)
    strata = np.tile(np.repeat(["W8", "W6", "W4"], 4), 8)
    level = np.select([strata == "W8", strata == "W6"], [0.0, 5.0], 10.0)
    x, y = level + RNG.normal(size=96), level + RNG.normal(size=96)
    assert spearmanr(x, y)[0] > 0.8
    assert abs(stratified_association(x, y, clusters, strata).rho) < 0.4
    related = stratified_association(x, x + 0.3 * RNG.normal(size=96), clusters, strata)
    assert related.rho > 0.6 and related.low > 0 and related.p_value < 0.01


def test_p_values_are_scipys_and_few_clusters_prove_little():
    for n in (2, 5, 10):
        values = RNG.normal(0.4, 0.5, n)
        expected = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flip_p(values) == pytest.approx(expected)
    clusters = np.repeat(["a", "b"], 5)
    agreed = stratified_association(np.tile(np.arange(5.0), 2), np.tile(np.arange(5.0), 2), clusters, clusters)
    assert agreed.rho == 1 and agreed.p_value == 0.5
    many = RNG.normal(0, 1, 40)
    assert sign_flip_p(many) == pytest.approx(ttest_1samp(many, 0).pvalue, abs=0.03)


def test_too_few_rows_have_no_association():
    one = np.array(["a", "a"])
    assert math.isnan(stratified_association(np.ones(2), np.ones(2), one, one).rho)
    three = np.array(["a"] * 3)
    constant = stratified_association(np.ones(3), np.arange(3.0), three, three)
    assert math.isnan(constant.rho) and constant.n_clusters == 0
    alone = stratified_association(
        np.array([1.0, 2, np.nan, 3]), np.array([1.0, 2, 5, 3]), np.array(["a"] * 4), np.array(["a"] * 4)
    )
    assert alone.rho == 1 and math.isnan(alone.p_value) and alone.n == 3
    with pytest.raises(VLMQError):
        stratified_association(np.ones(2), np.ones(3), one, one)
