import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from lightning_vlmq import metrics as m
from lightning_vlmq import statistics
from lightning_vlmq.core.errors import VLMQError


def placements(ids, oods):
    """DeLong's structural components by the O(n1 n2) definition."""
    wins = (ids[:, None] > oods[None]) + 0.5 * (ids[:, None] == oods[None])
    return wins.mean(1), wins.mean(0)


def quadratic_delong(ids, oods):
    """AUROCs and covariance of k models, float64 ``[k, n]`` inputs."""
    v10, v01 = zip(*(placements(i, o) for i, o in zip(ids, oods)))
    covariance = np.atleast_2d(np.cov(v10)) / ids.shape[1] + np.atleast_2d(np.cov(v01)) / oods.shape[1]
    return np.mean(v10, axis=1), covariance


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize(("n1", "n2"), [(80, 50), (2, 2), (3, 40)])
def test_against_the_quadratic_definition(n1, n2, levels):
    rng = np.random.default_rng(n1)
    ids, oods = rng.normal(0.8, 1, (2, n1)), rng.normal(0, 1, (2, n2))
    ids[1] += ids[0]
    oods[1] += oods[0]
    if levels:
        ids, oods = np.round(ids * levels) / levels, np.round(oods * levels) / levels
    aurocs, covariance = quadratic_delong(ids, oods)
    result = statistics.delong(*(torch.from_numpy(x) for x in (ids[0], oods[0], ids[1], oods[1])))
    y = np.r_[np.ones(n1), np.zeros(n2)]
    assert result.auroc_f == pytest.approx(aurocs[0]) == pytest.approx(roc_auc_score(y, np.r_[ids[0], oods[0]]))
    assert result.auroc_q == pytest.approx(aurocs[1])
    assert result.stderr_f == pytest.approx(covariance[0, 0] ** 0.5)
    assert statistics.delong_standard_error(torch.from_numpy(ids[1]), torch.from_numpy(oods[1])) == pytest.approx(
        covariance[1, 1] ** 0.5
    )
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance > 1e-12:
        assert result.stderr == pytest.approx(variance**0.5)
        z = (aurocs[1] - aurocs[0]) / variance**0.5
        assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(z)))
        low, high = stats.norm.interval(0.95, aurocs[1] - aurocs[0], variance**0.5)
        assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))


def test_closed_form_of_one_misplaced_sample():
    """One of n1 ID samples lies below all OOD samples.

    AUROC = 1 - 1/n1, V10 is n1 - 1 ones and a zero, V01 is constant.
    """
    ids = torch.tensor([-1.0, 2, 3, 4, 5])
    se = statistics.delong_standard_error(ids, torch.tensor([0.0, 0.5, 1.0]))
    assert se == pytest.approx((np.var([0, 1, 1, 1, 1], ddof=1) / 5) ** 0.5)


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(1)
    p_values = []
    for _ in range(300):
        shared_id, shared_ood = rng.normal(1, 1, 80), rng.normal(0, 1, 80)
        scores = [x + rng.normal(0, 0.7, 80) for x in (shared_id, shared_ood, shared_id, shared_ood)]
        p_values.append(statistics.delong(*map(torch.from_numpy, scores)).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_meets_the_paired_bootstrap():
    generator = torch.Generator().manual_seed(0)
    ids, oods = torch.randn(200, generator=generator) + 1, torch.randn(200, generator=generator)
    ids_q, oods_q = (x + 0.5 * torch.randn(200, generator=generator) for x in (ids, oods))
    exact = statistics.delong(ids, oods, ids_q, oods_q)
    boot = statistics.paired_bootstrap(m.auroc, [ids, oods], [ids_q, oods_q], n_resamples=2000, groups=(0, 1))
    assert exact.difference == pytest.approx(boot.estimate)
    assert exact.stderr == pytest.approx(boot.stderr, rel=0.1)


def test_degenerate():
    ids, oods = torch.randn(20) + 1, torch.randn(30)
    same = statistics.delong(ids, oods, ids, oods)
    assert (same.difference, same.stderr, same.p_value, same.low, same.high) == (0, 0, 1, 0, 0)
    rescaled = statistics.delong(ids, oods, 3 * ids, 3 * oods)
    assert rescaled.p_value == 1
    perfect = statistics.delong(torch.ones(5), torch.zeros(5), torch.zeros(5), torch.ones(5))
    assert perfect.difference == -1 and np.isnan(perfect.p_value)
    assert np.isnan(statistics.delong(ids[:1], oods, ids[:1], oods).stderr)
    broken = ids.clone()
    broken[0] = torch.nan
    assert np.isnan(statistics.delong(ids, oods, broken, oods).auroc_q) and np.isnan(
        statistics.delong_standard_error(broken, oods)
    )
    with pytest.raises(VLMQError, match="same samples"):
        statistics.delong(ids, oods, ids[:5], oods)
    with pytest.raises(VLMQError, match="confidence"):
        statistics.delong(ids, oods, ids, oods, confidence=95)


def test_linearithmic():
    generator = torch.Generator().manual_seed(0)
    ids, oods = (torch.randn(200_000, generator=generator) for _ in range(2))
    # under no separation the variance of AUROC is (n1 + n2 + 1) / (12 n1 n2)
    n = 200_000
    assert statistics.delong_standard_error(ids, oods) == pytest.approx(((2 * n + 1) / (12 * n * n)) ** 0.5, rel=0.01)


def test_benjamini_hochberg():
    p_values = torch.rand(40, dtype=torch.float64) ** 2
    order = p_values.argsort()
    raw = (p_values[order] * 40 / torch.arange(1, 41)).clamp(max=1)
    expected = torch.empty_like(raw)
    expected[order] = raw.flip(0).cummin(0).values.flip(0)
    torch.testing.assert_close(statistics.benjamini_hochberg(p_values), expected)
    torch.testing.assert_close(statistics.benjamini_hochberg(p_values.view(8, 5)), expected.view(8, 5))


def test_benjamini_hochberg_leaves_out_what_was_not_tested():
    p_values = torch.tensor([0.01, torch.nan, 0.04, torch.nan])
    adjusted = statistics.benjamini_hochberg(p_values)
    assert adjusted.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(adjusted[[0, 2]], statistics.benjamini_hochberg(torch.tensor([0.01, 0.04])))
    assert statistics.benjamini_hochberg(torch.tensor([torch.nan])).isnan().all()
    assert statistics.benjamini_hochberg(torch.zeros(0)).shape == (0,)
    with pytest.raises(VLMQError, match=r"\[0, 1\]"):
        statistics.benjamini_hochberg(torch.tensor([1.2]))


def test_share_improved():
    f = torch.tensor([0.1, 0.2, 0.3, 0.4, torch.nan, 0.1])
    q = torch.tensor([0.05, 0.2, 0.4, 0.3, 0.1, torch.nan])
    lower, higher = (statistics.share_improved(f, q, better) for better in ("lower", "higher"))
    assert (lower.n_improved, lower.n_compared, lower.share) == (2, 4, 0.5)
    assert (higher.n_improved, higher.n_compared, higher.share) == (1, 4, 0.25)
    # Wilson's interval, from its formula
    p, n, z = 0.25, 4, stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (higher.low, higher.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    none = statistics.share_improved(f[4:5], q[4:5], "lower")
    assert np.isnan(none.share) and none.n_compared == 0
    for kwargs, message in (({"better": "up"}, "unknown direction"), ({"better": "lower", "confidence": 2}, "confid")):
        with pytest.raises(VLMQError, match=message):
            statistics.share_improved(f, q, **kwargs)
    with pytest.raises(VLMQError, match="paired"):
        statistics.share_improved(f, q[:2], "lower")
