"""Bounded-memory metrics: the stated error bound holds on any data, and is small on ordinary data."""

import pytest
import torch
from cases.metric_tester import assert_equal, batches

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import adaptive_ece_from_cells, equal_width_bin_sums

DETECTION = {
    "auroc": m.auroc,
    "aupr_in": m.aupr_in,
    "aupr_out": m.aupr_out,
    "fpr95": m.fpr95,
    "fpr95_openood": m.fpr95_openood,
}


def scores(n, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(n, generator=generator)
    is_id = torch.rand(n, generator=generator) < torch.sigmoid(2 * score)
    return ((score * 5).round() / 5 if ties else score), is_id


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_bins", [1, 3, 40, 1000])
@pytest.mark.parametrize("n", [5, 60, 2000])
def test_detection_bounds_hold(n, n_bins, ties):
    for seed in range(20):
        score, is_id = scores(n, seed, ties)
        if is_id.all() or not is_id.any():
            continue
        metric = m.BinnedDetection(low=-2, high=2, n_bins=n_bins)  # a range that cuts both tails
        for batch in batches({"score": score, "is_id": is_id}, [n // 3, n - n // 3]):
            metric.update(**batch)
        result = metric.compute()
        for name, exact in DETECTION.items():
            error = (result[name] - exact(score[is_id], score[~is_id])).abs()
            assert error <= result[f"{name}_error_bound"] + 1e-10, (name, seed)


@pytest.mark.parametrize("order", ["positives first", "negatives first"])
def test_detection_bounds_are_met_in_the_worst_case(order):
    """One bin for everything, and the scores inside fully sorted: the bounds cannot be made smaller there."""
    ids, oods = torch.linspace(0.6, 0.9, 30), torch.linspace(0.1, 0.4, 30)
    if order == "negatives first":
        ids, oods = oods, ids
    metric = m.BinnedDetection(n_bins=1)
    metric.update(torch.cat([ids, oods]), torch.arange(60) < 30)
    result = metric.compute()
    assert result["auroc"] == 0.5 and result["auroc_error_bound"] == 0.5
    for name in ("auroc", "aupr_in", "aupr_out"):
        error = (result[name] - DETECTION[name](ids, oods)).abs().item()
        assert error <= result[f"{name}_error_bound"] + 1e-12
    assert (m.auroc(ids, oods) - 0.5).abs() == result["auroc_error_bound"]


def test_detection_bounds_are_small():
    score, is_id = scores(100_000, 0, False)
    metric = m.BinnedDetection(low=-5, high=5)
    metric.update(score, is_id)
    result = metric.compute()
    for name, exact in DETECTION.items():
        assert result[f"{name}_error_bound"] < 1e-3, name
        assert result[name].item() == pytest.approx(exact(score[is_id], score[~is_id]).item(), abs=1e-3)


def test_detection_is_exact_when_every_score_has_its_bin():
    score, is_id = scores(500, 1, True)
    metric = m.BinnedDetection(low=-5.1, high=4.9, n_bins=50)
    metric.update(score, is_id)
    result = metric.compute()
    for name, exact in DETECTION.items():
        assert result[name].item() == pytest.approx(exact(score[is_id], score[~is_id]).item(), abs=1e-12), name


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_detection_degenerate():
    assert all(value.isnan() for value in m.BinnedDetection().compute().values())
    one_sided, broken = m.BinnedDetection(), m.BinnedDetection()
    one_sided.update(torch.rand(5), torch.ones(5).bool())
    broken.update(torch.tensor([0.1, torch.nan, 0.3]), torch.tensor([True, True, False]))
    assert all(value.isnan() for value in one_sided.compute().values())
    assert all(value.isnan() for value in broken.compute().values())
    infinite = m.BinnedDetection()
    infinite.update(torch.tensor([torch.inf, -torch.inf]), torch.tensor([True, False]))
    assert infinite.compute()["auroc"] == 1
    for kwargs in ({"low": 1.0, "high": 1.0}, {"n_bins": 0}):
        with pytest.raises(VLMQError, match="low < high"):
            m.BinnedDetection(**kwargs)
    with pytest.raises(VLMQError, match="must be"):
        m.BinnedDetection().update(torch.rand(3), torch.ones(2).bool())


@pytest.mark.parametrize("cells", [1, 7, 64, 4096])
@pytest.mark.parametrize("n", [1, 10, 15, 400])
@pytest.mark.parametrize("shape", ["uniform", "sharp", "tied"])
def test_adaptive_bound_holds(n, cells, shape):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        confidence = torch.rand(n, generator=generator)
        confidence = {"uniform": confidence, "sharp": 1 - confidence**6, "tied": (confidence * 9).round() / 9}[shape]
        correct = torch.rand(n, generator=generator) < confidence**2
        bounded = adaptive_ece_from_cells(equal_width_bin_sums(confidence, correct, cells), 15)
        exact = m.calibration_error(confidence, correct, 15, binning="mass")
        assert (bounded.value - exact).abs() <= bounded.error_bound + 1e-12


def test_adaptive_metric_streams_and_is_close():
    generator = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(20_000, 6, generator=generator), torch.randint(6, (20_000,), generator=generator)
    exact, binned = m.AdaptiveCalibrationError(), m.BinnedAdaptiveCalibrationError()
    target[::4] = -1
    for batch in batches({"logits": logits, "target": target}, [1, 9999, 0, 10_000]):
        exact.update(**batch)
        binned.update(**batch)
    result = binned.compute()
    assert result["adaptive_ece_error_bound"] < 2e-3
    assert_equal(result["adaptive_ece"], exact.compute(), float(result["adaptive_ece_error_bound"]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_adaptive_degenerate():
    assert all(value.isnan() for value in m.BinnedAdaptiveCalibrationError().compute().values())
    broken = m.BinnedAdaptiveCalibrationError()
    broken.update(torch.tensor([[torch.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert broken.compute()["adaptive_ece"].isnan()
    with pytest.raises(VLMQError, match="at least 1"):
        m.BinnedAdaptiveCalibrationError(cells=0)
