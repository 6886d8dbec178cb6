"""Calibration errors and reliability diagrams against torchmetrics, scikit-learn and numpy; degenerate input."""

import numpy as np
import pytest
import torch
from cases.records import random_records
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError


@pytest.mark.parametrize("norm", ["l1", "max", "l2"])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("levels", [None, 10, 30, 1])
def test_equal_width_is_torchmetrics(norm, n_bins, levels):
    confidence, correct = random_records(500, seed=n_bins, levels=levels)
    expected = binary_calibration_error(confidence, correct.int(), n_bins=n_bins, norm=norm)
    torch.testing.assert_close(
        m.calibration_error(confidence, correct, n_bins, norm), expected.double(), atol=1e-6, rtol=0
    )


def test_saturated_softmax_is_torchmetrics():
    logits = 40 * torch.randn(300, 5)
    target = torch.randint(5, (300,))
    rows = m.per_sample(logits, target)
    assert (rows["confidence"] == 1).any()
    for norm in ("l1", "max", "l2"):
        expected = multiclass_calibration_error(logits.softmax(-1), target, num_classes=5, n_bins=15, norm=norm)
        value = m.calibration_error(rows["confidence"], rows["correct"], norm=norm)
        torch.testing.assert_close(value, expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n", "n_bins"), [(1, 15), (7, 15), (100, 15), (101, 1), (90, 15)])
def test_equal_mass_is_array_split(n, n_bins):
    confidence, correct = random_records(n, seed=n)
    order = confidence.argsort().numpy()
    c, a = (np.array_split(x.double().numpy()[order], n_bins) for x in (confidence, correct))
    gaps = np.array([abs(x.mean() - y.mean()) if len(x) else 0 for x, y in zip(c, a)])
    share = np.array([len(x) for x in c]) / n
    for norm, expected in {"l1": gaps @ share, "max": gaps.max(), "l2": np.sqrt(gaps**2 @ share)}.items():
        value = m.calibration_error(confidence, correct, n_bins, norm, "mass")
        assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_sample_order_does_not_matter(binning):
    confidence, correct = random_records(400, levels=20)
    order = torch.randperm(400)
    value = m.calibration_error(confidence, correct, binning=binning)
    torch.testing.assert_close(m.calibration_error(confidence[order], correct[order], binning=binning), value)
    torch.testing.assert_close(m.aurc(confidence[order], correct[order]), m.aurc(confidence, correct))


def test_equal_mass_ties_share_their_mean():
    # one confidence for all: every bin sees the mean accuracy, whatever the order
    confidence, correct = torch.full((10,), 0.5), torch.tensor([True] * 9 + [False])
    assert m.calibration_error(confidence, correct, 3, binning="mass").item() == pytest.approx(0.4)


@pytest.mark.parametrize("levels", [None, 12])
def test_records_metrics_take_leading_dimensions(levels):
    confidence, correct = random_records(2, 3, 50, levels=levels)
    scores = torch.randn(2, 3, 40)
    cases = [
        (lambda c, k, s: m.calibration_error(c, k), ()),
        (lambda c, k, s: m.calibration_error(c, k, binning="mass", norm="max"), ()),
        (lambda c, k, s: m.aurc(c, k), ()),
        (lambda c, k, s: m.risk_at_coverage(c, k), (50,)),
        (lambda c, k, s: m.reliability_bins(c, k).accuracy, (15,)),
        (lambda c, k, s: m.auroc(c, s), ()),
        (lambda c, k, s: m.aupr_in(c, s), ()),
        (lambda c, k, s: m.aupr_out(c, s), ()),
        (lambda c, k, s: m.fpr95(c, s), ()),
        (lambda c, k, s: m.fpr95_openood(c, s), ()),
    ]
    for fn, tail in cases:
        batched = fn(confidence, correct, scores)
        assert batched.shape == (2, 3, *tail)
        for i in range(2):
            for j in range(3):
                single = fn(confidence[i, j], correct[i, j], scores[i, j])
                torch.testing.assert_close(batched[i, j], single, equal_nan=True)


def test_calibration_degenerate():
    empty = torch.zeros(0)
    for binning in ("width", "mass"):
        for norm in ("l1", "max", "l2"):
            assert m.calibration_error(empty, empty.bool(), norm=norm, binning=binning).isnan()
            nan = m.calibration_error(torch.tensor([0.2, torch.nan]), torch.tensor([True, False]), 15, norm, binning)
            assert nan.isnan()
            one = m.calibration_error(torch.tensor([0.25]), torch.tensor([True]), 15, norm, binning)
            assert one.item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: m.calibration_error(torch.tensor([1.5]), torch.tensor([True])), r"\[0, 1\]"),
        (lambda: m.calibration_error(torch.rand(3), torch.ones(2).bool()), "share a shape"),
        (lambda: m.calibration_error(torch.rand(3), torch.ones(3).bool(), 0), "n_bins"),
        (lambda: m.calibration_error(torch.rand(3), torch.ones(3).bool(), norm="l3"), "unknown norm"),
        (lambda: m.calibration_error(torch.rand(3), torch.ones(3).bool(), binning="mas"), "did you mean mass"),
        (lambda: m.classwise_ece(torch.rand(3, 2), torch.tensor([0, 1, -1])), "without a class"),
        (lambda: m.classwise_ece(torch.rand(3, 2), torch.tensor([0, 1])), "probs must be"),
        (lambda: m.aurc(torch.rand(3), torch.ones(2).bool()), "share a shape"),
        (lambda: m.auroc(torch.tensor(1.0), torch.rand(3)), "scalar"),
    ],
)
def test_calibration_bad_input(act, message):
    with pytest.raises(VLMQError, match=message):
        act()


def test_reliability_bins_against_sklearn():
    confidence, correct = random_records(1000, levels=64)
    bins = m.reliability_bins(confidence, correct, 10)
    filled = bins.count > 0
    accuracy, mean = calibration_curve(correct.numpy(), confidence.double().numpy(), n_bins=10)
    # scikit-learn bins are (lo, hi]; levels of 1/64 meet tenths only at 0, 0.5 and 1: leave those two bins out
    keep = [i for i in range(10) if i not in (4, 5)]
    np.testing.assert_allclose(bins.accuracy[filled][keep], accuracy[keep])
    np.testing.assert_allclose(bins.confidence[filled][keep], mean[keep])
    assert bins.count.sum() == 1000 and bins.edges.tolist() == pytest.approx(np.linspace(0, 1, 11))


def test_reliability_bins_edges_and_empty_bins():
    bins = m.reliability_bins(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([False, True, True]), 4)
    assert bins.count.tolist() == [1, 0, 1, 1]
    assert bins.accuracy.isnan().tolist() == [False, True, False, False]
    assert bins.confidence[3] == 1.0


def test_classwise_two_classes_and_batch():
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(80, generator=generator)
    y = (torch.rand(80, generator=generator) < 0.5).long()
    probs = torch.stack([1 - p, p], -1)
    expected = [binary_calibration_error(probs[:, c].contiguous(), (y == c).int(), n_bins=6) for c in (0, 1)]
    value = m.classwise_ece(probs, y, 6)
    assert value.item() == pytest.approx(float(sum(expected)) / 2, abs=1e-6)
    torch.testing.assert_close(m.classwise_ece(probs.expand(3, 80, 2), y.expand(3, 80), 6), value.expand(3))
    assert m.classwise_ece(torch.zeros(0, 2), torch.zeros(0).long()).isnan()


def test_trajectories_follow_the_same_samples():
    confidence, correct = random_records(3, 500, seed=9, levels=50)
    bins = m.trajectory_bins(confidence, correct, 10)
    own = m.reliability_bins(confidence[0], correct[0], 10)
    torch.testing.assert_close(bins.count, own.count)
    torch.testing.assert_close(bins.confidence[0], own.confidence, equal_nan=True)
    torch.testing.assert_close(bins.accuracy[0], own.accuracy, equal_nan=True)
    edges = torch.linspace(0, 1, 11)
    for b in range(10):
        upper = confidence[0] <= 1 if b == 9 else confidence[0] < edges[b + 1]
        member = (confidence[0] >= edges[b]) & upper
        for model in (1, 2):
            assert bins.confidence[model, b].item() == pytest.approx(confidence[model, member].double().mean().item())
            assert bins.accuracy[model, b].item() == pytest.approx(correct[model, member].double().mean().item())


def test_trajectories_degenerate():
    bins = m.trajectory_bins(torch.tensor([[0.95], [torch.nan]]), torch.tensor([[True], [False]]), 4)
    assert bins.count.tolist() == [0, 0, 0, 1]
    assert bins.confidence.isnan().tolist() == [[True, True, True, False], [True] * 4]
    assert bins.accuracy[:, 3].tolist() == [1, 0]
    assert m.trajectory_bins(torch.zeros(2, 0), torch.zeros(2, 0).bool()).accuracy.isnan().all()
    for confidence, message in ((torch.rand(4), "models"), (torch.tensor([[torch.nan]]), "NaN")):
        with pytest.raises(VLMQError, match=message):
            m.trajectory_bins(confidence, torch.ones_like(confidence).bool())
