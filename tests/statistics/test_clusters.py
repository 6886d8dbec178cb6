"""Means over clusters that share their samples: coverage of a known truth, and the edges."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.statistics import clustered_mean


def draw(rng, k, between, within, common, n=400, resamples=200, truth=0.3):
    """Points and replicates of k clusters: their own effect, own noise of n samples, and noise that the samples give to all alike."""
    shared, own = rng.standard_normal(n), rng.standard_normal((n, k))
    data = truth + between * rng.standard_normal(k) + math.sqrt(n) * (common * shared[:, None] + within * own)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return data.mean(0), counts @ data / n


@pytest.mark.parametrize(
    ("k", "between", "within", "common"),
    [(10, 1.0, 0.2, 0.0), (5, 0.3, 0.1, 0.5), (3, 0.5, 0.5, 0.2), (10, 0.0, 1.0, 0.3)],
)
def test_the_interval_covers_another_draw_of_clusters_and_samples(k, between, within, common):
    rng = np.random.default_rng(k)
    repetitions, hits = 400, 0
    for _ in range(repetitions):
        found = clustered_mean(*draw(rng, k, between, within, common))
        hits += found.low <= 0.3 <= found.high
    # the common part's error is known from many samples, so that few clusters may cover more than 95 %, not less
    assert stats.binom.cdf(hits, repetitions, 0.95) > 0.001, hits


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_a_common_error_of_known_size_is_covered_at_any_share(k, ratio):
    """Clusters whose spread is 1, and one error of all of them that no replicate shows."""
    rng, unseen, repetitions = np.random.default_rng([k, int(10 * ratio)]), ratio / math.sqrt(k), 2000
    found = [
        clustered_mean(rng.standard_normal(k) + unseen * rng.standard_normal(), None, unseen)
        for _ in range(repetitions)
    ]
    hits = sum(f.low <= 0 <= f.high for f in found)
    assert stats.binom.cdf(hits, repetitions, 0.95) > 0.001, hits
    assert np.mean([f.stderr**2 for f in found]) == pytest.approx(1 / k + unseen**2, rel=0.1)


def test_without_replicates_it_is_the_t_interval():
    points = np.random.default_rng(0).standard_normal(7)
    found, expected = clustered_mean(points), stats.ttest_1samp(points, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n_clusters == 7 and found.stderr == pytest.approx(stats.sem(points))


def test_one_cluster_is_judged_over_samples_alone():
    replicates = np.random.default_rng(1).normal(0.2, 0.05, (5000, 1))
    found = clustered_mean(np.array([0.2]), replicates)
    assert found.stderr == pytest.approx(0.05, rel=0.05) and found.high - found.low == pytest.approx(0.196, rel=0.05)
    assert math.isnan(clustered_mean(np.array([0.2])).stderr)
    assert clustered_mean(np.array([0.2]), None, 0.05).stderr == 0.05
    assert clustered_mean(np.array([0.2]), replicates, 0.12).stderr == pytest.approx(0.13, rel=0.02)


def test_replicates_that_are_not_finite_are_left_out():
    replicates = np.random.default_rng(2).normal(0, 1, (300, 2))
    broken = np.r_[replicates, [[np.nan, 0.0], [np.inf, 1.0]]]
    assert clustered_mean(np.array([0.0, 1.0]), broken) == clustered_mean(np.array([0.0, 1.0]), replicates)
    assert math.isnan(clustered_mean(np.array([0.0, 1.0]), broken[-2:]).high)
    for bad in ((np.empty(0), None), (np.zeros(2), np.zeros((5, 3))), (np.zeros((2, 2)), None)):
        with pytest.raises(VLMQError):
            clustered_mean(*bad)
