import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError


def random_records(*shape, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(*shape, generator=generator)
    if levels:
        confidence = (confidence * levels).round() / levels  # ties, and exact 0, 1 and bin edges
    return confidence, torch.rand(*shape, generator=generator) < confidence


# --- per sample -------------------------------------------------------------------------------------------------------


def test_per_sample_against_float64():
    generator = torch.Generator().manual_seed(1)
    logits, target = 5 * torch.randn(200, 11, generator=generator), torch.randint(11, (200,), generator=generator)
    rows = m.per_sample(logits, target)
    log_p = log_softmax(logits.double().numpy(), axis=1)
    y = target.numpy()
    np.testing.assert_array_equal(rows["prediction"], log_p.argmax(1))
    np.testing.assert_allclose(rows["confidence"], np.exp(log_p).max(1), rtol=1e-5)
    np.testing.assert_allclose(rows["nll"], -log_p[np.arange(200), y], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows["brier"], ((np.exp(log_p) - np.eye(11)[y]) ** 2).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(rows["correct"], log_p.argmax(1) == y)
    top5 = top_k_accuracy_score(y, log_p, k=5, labels=np.arange(11))
    assert rows["correct_top5"].double().mean().item() == pytest.approx(top5)
    assert {name: c.dtype for name, c in rows.items()} == {
        "prediction": torch.int64,
        "confidence": torch.float32,
        "correct": torch.bool,
        "correct_top5": torch.bool,
        "nll": torch.float32,
        "brier": torch.float32,
    }


@pytest.mark.parametrize("n_classes", [1, 2, 4, 5, 6])
def test_top5_with_few_classes(n_classes):
    logits = torch.arange(n_classes, 0, -1).float().expand(n_classes, -1)
    rows = m.per_sample(logits, torch.arange(n_classes))
    assert rows["correct_top5"].tolist() == [rank < 5 for rank in range(n_classes)]
    assert rows["correct"].tolist() == [rank == 0 for rank in range(n_classes)]


def test_equal_logits_rank_in_class_order():
    rows = m.per_sample(torch.zeros(7, 7), torch.arange(7))
    assert rows["correct"].tolist() == [True] + [False] * 6
    assert rows["correct_top5"].tolist() == [True] * 5 + [False] * 2


def test_without_class_and_broken_rows():
    logits = torch.zeros(5, 3)
    logits[1, 0], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 1] = -torch.inf
    rows = m.per_sample(logits, torch.tensor([-1, 0, 0, 0, 1]))
    assert rows["prediction"].tolist() == [0, -1, -1, -1, 0]
    assert not rows["correct"].any() and not rows["correct_top5"][:4].any()
    assert rows["confidence"].isnan().tolist() == [False, True, True, True, False]
    assert rows["nll"].isnan().tolist() == rows["brier"].isnan().tolist() == [True, True, True, True, False]
    assert rows["nll"][4] == torch.inf and rows["brier"][4] == pytest.approx(1.5)


def test_per_sample_half_precision_and_empty():
    logits = torch.randn(4, 3)
    rows = m.per_sample(logits.bfloat16(), torch.zeros(4).long())
    assert rows["confidence"].dtype == torch.float32
    torch.testing.assert_close(rows["nll"], m.per_sample(logits.bfloat16().float(), torch.zeros(4).long())["nll"])
    assert all(c.shape == (0,) for c in m.per_sample(torch.zeros(0, 3), torch.zeros(0).long()).values())


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"targets must lie in \[-1, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0, -2]), r"targets must lie"),
        (torch.zeros(2, 3), torch.tensor([0]), "target"),
        (torch.zeros(2, 0), torch.tensor([0, 0]), "C > 0"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 0]), "floating point"),
    ],
)
def test_per_sample_bad_input(logits, target, message):
    with pytest.raises(VLMQError, match=message):
        m.per_sample(logits, target)


@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
def test_kl_divergence_is_scipys_and_torchs(size):
    f = torch.randn(40, 7, dtype=torch.float64) * 5
    q = f + size * torch.randn(40, 7, dtype=torch.float64)
    found = m.kl_divergence(f, q)
    assert found.dtype == torch.float64 and (found >= 0).all()
    np.testing.assert_allclose(found, scipy.stats.entropy(f.softmax(1), q.softmax(1), axis=1), rtol=1e-6, atol=1e-14)
    theirs = F.kl_div(q.log_softmax(1), f.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(found, theirs, rtol=1e-7, atol=1e-14)


def test_kl_divergence_of_undefined_and_impossible_classes():
    inf, nan = torch.inf, torch.nan
    f = torch.tensor([[0.0, -inf], [0.0, 0.0], [0.0, nan], [0.0, 0.0], [1.0, 2.0]])
    q = torch.tensor([[3.0, -inf], [0.0, -inf], [0.0, 0.0], [-inf, -inf], [1.0, 2.0]])
    found = m.kl_divergence(f, q)
    assert found[[0, 1, 4]].tolist() == [0, inf, 0] and found[[2, 3]].isnan().all()
    assert m.kl_divergence(f[:0], q[:0]).shape == (0,)
    with pytest.raises(VLMQError, match="of the same samples"):
        m.kl_divergence(f, q[:, :1])


def test_agreement_batched_and_degenerate():
    f, q = torch.tensor([[0, 1, -1], [2, 2, 2]]), torch.tensor([[0, 2, -1], [2, 2, 2]])
    torch.testing.assert_close(m.agreement(f, q), torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    assert m.agreement(f[0, :0], q[0, :0]).isnan()
    with pytest.raises(VLMQError, match="same samples"):
        m.agreement(f, q[:, :2])


# --- calibration ------------------------------------------------------------------------------------------------------


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


# --- selective prediction ---------------------------------------------------------------------------------------------


def test_aurc_closed_form():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6])
    value = m.aurc(confidence, torch.tensor([True, False, True, False]))
    assert value.item() == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 2 / 4]))
    assert m.aurc(confidence, torch.ones(4).bool()) == 0 and m.aurc(confidence, torch.zeros(4).bool()) == 1
    assert m.aurc(torch.zeros(0), torch.zeros(0).bool()).isnan()
    assert m.aurc(torch.tensor([0.5, torch.nan]), torch.ones(2).bool()).isnan()


def test_aurc_with_ties_is_the_mean_over_orders():
    confidence = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.2])
    correct = torch.tensor([True, True, False, False, True])
    rng = np.random.default_rng(0)
    values = []
    for _ in range(4000):
        wrong = 1 - correct.numpy()[np.r_[0, rng.permutation([1, 2, 3]), 4]].astype(float)
        values.append(np.mean(np.cumsum(wrong) / np.arange(1, 6)))
    assert m.aurc(confidence, correct).item() == pytest.approx(np.mean(values), abs=4 * np.std(values) / 4000**0.5)


# --- change -----------------------------------------------------------------------------------------------------------


def test_changes():
    assert m.relative_change(0.8, 0.6).item() == pytest.approx(0.25)
    assert m.relative_change(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.75, 0.1, 0.0])).tolist()[0] == -0.5
    assert m.relative_change(torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.75, 0.1, 0.0])).isnan().tolist() == [
        False,
        True,
        True,
    ]
    assert m.relative_spurious_gap(0.8, 0.4).item() == pytest.approx(0.5)
    assert m.relative_spurious_gap(0, 0.4).isnan()
    assert m.added_vulnerability(0.3, 0.1).item() == pytest.approx(0.2)
    assert m.added_vulnerability(torch.nan, 0.1).isnan()


@pytest.mark.parametrize("levels", [None, 8])
def test_coverage_at_risk_by_trying_every_threshold(levels):
    for seed in range(5):
        confidence, correct = random_records(60, seed=seed, levels=levels)
        for risk in (0.0, 0.05, 0.2, 0.5, 1.0):
            kept = [confidence >= t for t in confidence.unique()]
            possible = [k.double().mean().item() for k in kept if (~correct[k]).sum() <= risk * k.sum().item() + 1e-9]
            value = m.coverage_at_risk(confidence, correct, risk)
            assert value.item() == pytest.approx(max(possible, default=0.0))
    confidence, correct = random_records(3, 40, levels=levels)
    batched = m.coverage_at_risk(confidence, correct, 0.3)
    assert batched.tolist() == [m.coverage_at_risk(c, k, 0.3).item() for c, k in zip(confidence, correct)]


def test_coverage_at_risk_degenerate():
    c = torch.tensor([0.9, 0.1])
    assert m.coverage_at_risk(c, torch.tensor([False, False]), 0.1) == 0
    assert m.coverage_at_risk(c, torch.tensor([True, True]), 0.0) == 1
    assert m.coverage_at_risk(c[:0], torch.zeros(0).bool(), 0.1).isnan()
    assert m.coverage_at_risk(torch.tensor([0.9, torch.nan]), torch.ones(2).bool(), 0.1).isnan()
    with pytest.raises(VLMQError, match="risk"):
        m.coverage_at_risk(c, torch.ones(2).bool(), 5)


# --- trajectories -----------------------------------------------------------------------------------------------------


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
