import time

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_vlmq import metrics as m
from lightning_vlmq import statistics
from lightning_vlmq.core.errors import VLMQError


def mean(column):
    return column.double().mean(-1)


def test_indices_are_seeded_and_uniform():
    draw = [statistics.bootstrap_indices(50, 400, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (400, 50) and draw[0].min() == 0 and draw[0].max() == 49
    assert stats.chisquare(np.bincount(draw[0].flatten())).pvalue > 1e-4
    with pytest.raises(VLMQError, match="0 samples"):
        statistics.bootstrap_indices(0, 3, torch.Generator())


def test_chunks_do_not_change_the_result(monkeypatch):
    column, other = torch.randn(40), torch.randn(30)
    columns = torch.randn(40, 3)

    def run():
        return (
            statistics.bootstrap_replicates(m.auroc, column, other, n_resamples=50, seed=1, groups=(0, 1)),
            statistics.bootstrap_means(columns, 50, seed=1),
        )

    whole = run()
    monkeypatch.setitem(statistics.bootstrap_replicates.__globals__, "_CHUNK_ELEMENTS", 40 * 7)
    for a, b in zip(whole, run()):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_means_are_the_general_replicates():
    columns = torch.stack([torch.randn(60), (torch.rand(60) < 0.3).float()], 1)
    fast = statistics.bootstrap_means(columns, 100, seed=5)
    for k in range(2):
        slow = statistics.bootstrap_replicates(mean, columns[:, k], n_resamples=100, seed=5)
        torch.testing.assert_close(fast[:, k], slow)
    columns[3, 1] = torch.nan
    broken = statistics.bootstrap_means(columns, 100, seed=5)
    assert broken[:, 1].isnan().all() and torch.equal(broken[:, 0], fast[:, 0])


def test_standard_errors_of_means():
    column = torch.rand(2, 400) < 0.3
    expected = stats.sem(column.double().numpy(), axis=-1)
    np.testing.assert_allclose(statistics.standard_error_of_mean(column), expected)
    boot = statistics.bootstrap_standard_error(mean, column[0], n_resamples=2000)
    assert boot == pytest.approx(expected[0], rel=0.08)
    assert (
        statistics.standard_error_of_mean(torch.ones(1)).isnan()
        and statistics.standard_error_of_mean(torch.ones(3)) == 0
    )


def test_groups_pair_or_separate():
    a = torch.randn(300)
    together = statistics.bootstrap_replicates(lambda x, y: mean(x) - mean(y), a, a, n_resamples=50, seed=0)
    apart = statistics.bootstrap_replicates(
        lambda x, y: mean(x) - mean(y), a, a, n_resamples=2000, seed=0, groups=(0, 1)
    )
    assert (together == 0).all()
    assert apart.std().item() == pytest.approx(stats.sem(a) * 2**0.5, rel=0.1)


def test_auroc_standard_error_meets_delong():
    ids, oods = torch.randn(250) + 1, torch.randn(180)
    boot = statistics.bootstrap_standard_error(m.auroc, ids, oods, n_resamples=1500, groups=(0, 1))
    assert boot == pytest.approx(statistics.delong_standard_error(ids, oods), rel=0.1)


def test_interval_and_p_value_against_scipy():
    """Paired difference of means: scipy's percentile bootstrap and the t-test are the references."""
    generator = torch.Generator().manual_seed(2)
    f = torch.randn(150, generator=generator)
    q = f + 0.5 * torch.randn(150, generator=generator)
    result = statistics.paired_bootstrap(mean, [f], [q], n_resamples=8000, seed=1)
    reference = stats.bootstrap(
        (q.double().numpy() - f.double().numpy(),), np.mean, n_resamples=8000, method="percentile", rng=1
    )
    assert result.estimate == pytest.approx((q.double() - f.double()).mean().item())
    assert result.stderr == pytest.approx(reference.standard_error, rel=0.05)
    assert result.low == pytest.approx(reference.confidence_interval.low, abs=0.1 * result.stderr)
    assert result.high == pytest.approx(reference.confidence_interval.high, abs=0.1 * result.stderr)
    t_test = stats.ttest_rel(q.double(), f.double())
    assert result.p_value == pytest.approx(t_test.pvalue, abs=0.03) and 0.05 < t_test.pvalue < 0.95
    assert result.n_resamples == 8000


def test_p_values_are_uniform_under_the_null():
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for seed in range(200):
        f = torch.randn(60, generator=generator)
        q = f + torch.randn(60, generator=generator)
        p_values.append(statistics.paired_bootstrap(mean, [f], [q], n_resamples=300, seed=seed).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_intervals_cover():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        column = torch.rand(100, generator=generator) < 0.3
        result = statistics.bootstrap(mean, column, n_resamples=300, seed=seed, confidence=0.9)
        hits += result.low <= 0.3 <= result.high
    assert stats.binomtest(hits, 200, 0.9).pvalue > 1e-3


def test_no_change_and_certain_change():
    f = torch.rand(50) < 0.5
    same = statistics.paired_bootstrap(mean, [f], [f], n_resamples=100)
    assert (same.estimate, same.stderr, same.low, same.high, same.p_value) == (0, 0, 0, 0, 1)
    sure = statistics.paired_bootstrap(mean, [torch.zeros(50)], [torch.ones(50)], n_resamples=99)
    assert (sure.low, sure.high, sure.p_value) == (1, 1, 0.02)


def test_relative_change_and_undefined_resamples():
    f = torch.tensor([True, False, False])
    result = statistics.paired_bootstrap(mean, [f], [~f], n_resamples=400, combine=m.relative_change)
    assert result.estimate == pytest.approx(-1.0)
    # no resample without the one correct sample has a relative change: (2/3)^3 of them
    assert stats.binomtest(400 - result.n_resamples, 400, (2 / 3) ** 3).pvalue > 1e-3
    never = statistics.paired_bootstrap(mean, [torch.zeros(3)], [f], n_resamples=10, combine=m.relative_change)
    assert np.isnan([never.estimate, never.stderr, never.low, never.high, never.p_value]).all()


def test_two_model_statistics():
    generator = torch.Generator().manual_seed(4)
    common_f, counter_f, common_q, counter_q = (
        torch.rand(n, generator=generator) < p for n, p in ((200, 0.9), (150, 0.7), (200, 0.8), (150, 0.4))
    )

    def vuln_add(n_f, c_f, n_q, c_q):
        return m.added_vulnerability(m.relative_change(mean(c_f), mean(c_q)), m.relative_change(mean(n_f), mean(n_q)))

    result = statistics.bootstrap(
        vuln_add, common_f, counter_f, common_q, counter_q, groups=(0, 1, 0, 1), n_resamples=500
    )
    a = [x.double().mean().item() for x in (common_f, counter_f, common_q, counter_q)]
    assert result.estimate == pytest.approx((a[1] - a[3]) / a[1] - (a[0] - a[2]) / a[0])
    assert result.low < result.estimate < result.high and result.p_value < 0.01

    rsg = statistics.paired_bootstrap(
        lambda n, c: m.relative_spurious_gap(mean(n), mean(c)),
        [common_f, counter_f],
        [common_q, counter_q],
        groups=(0, 1),
        n_resamples=200,
    )
    assert rsg.estimate == pytest.approx((a[2] - a[3]) / a[2] - (a[0] - a[1]) / a[0])

    labels = torch.randint(3, (2, 80), generator=generator)
    agreed = statistics.bootstrap(m.agreement, labels[0], labels[1], n_resamples=300)
    assert agreed.stderr == pytest.approx(statistics.standard_error_of_mean(labels[0] == labels[1]).item(), rel=0.2)


def test_record_metrics_run_as_one_call_per_chunk():
    confidence, correct = torch.rand(100), torch.rand(100) < 0.5
    calls = []

    def ece(c, k):
        calls.append(c.shape)
        return m.calibration_error(c, k, binning="mass")

    statistics.bootstrap_standard_error(ece, confidence, correct, n_resamples=64)
    assert calls == [(64, 100)]


def test_ten_thousand_by_ten_thousand_is_quick():
    columns = torch.rand(10_000, 8)
    start = time.process_time()
    replicates = statistics.bootstrap_means(columns, 10_000)
    assert time.process_time() - start < 20  # the budget: 10 s on 2 cores
    np.testing.assert_allclose(replicates.std(0), statistics.standard_error_of_mean(columns.T), rtol=0.05)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: statistics.bootstrap(mean, torch.zeros(0)), "n > 0"),
        (lambda: statistics.bootstrap(mean, torch.zeros(2, 2)), "n > 0"),
        (lambda: statistics.bootstrap(m.auroc, torch.rand(3), torch.rand(4)), r"groups=\(0, 1\)"),
        (lambda: statistics.bootstrap(m.auroc, torch.rand(3), torch.rand(4), groups=(0,)), "one group per column"),
        (lambda: statistics.bootstrap(mean), "one group per column"),
        (lambda: statistics.bootstrap(lambda c: c.mean(), torch.rand(3)), r"\[r, n\] to \[r\]"),
        (lambda: statistics.bootstrap(mean, torch.rand(3), confidence=95), "confidence"),
        (lambda: statistics.paired_bootstrap(mean, [torch.rand(3)], [torch.rand(4)]), "same samples"),
        (lambda: statistics.bootstrap_means(torch.rand(3)), r"\[n, k\]"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()
