"""Per-sample records, selective prediction and changes against float64 computations; degenerate input."""

import numpy as np
import pytest
import scipy.stats
import torch
from cases.records import random_records
from scipy.special import log_softmax
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional as F

from lightning_vlmq import metrics as m
from lightning_vlmq.core.errors import VLMQError


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
    same, copied = m.kl_divergence(q, q), m.kl_divergence(q, q.clone())
    assert same.dtype == copied.dtype == torch.float64 and torch.equal(same.isnan(), copied.isnan())
    assert torch.equal(same.nan_to_num(), copied.nan_to_num())
    with pytest.raises(VLMQError, match="of the same samples"):
        m.kl_divergence(f, q[:, :1])


def test_agreement_batched_and_degenerate():
    f, q = torch.tensor([[0, 1, -1], [2, 2, 2]]), torch.tensor([[0, 2, -1], [2, 2, 2]])
    torch.testing.assert_close(m.agreement(f, q), torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    assert m.agreement(f[0, :0], q[0, :0]).isnan()
    with pytest.raises(VLMQError, match="same samples"):
        m.agreement(f, q[:, :2])


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
