"""The stateful metrics with inputs and independently computed expected values."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from cases.metric_tester import Case, N
from lightning_vlmq import metrics as m

C = 7


def _numpy_brier(probs: np.ndarray, target: np.ndarray) -> float:
    return float(((probs - np.eye(C)[target]) ** 2).sum(1).mean())


def _numpy_adaptive_ece(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> float:
    order = np.argsort(confidence, kind="stable")
    parts = zip(np.array_split(confidence[order], n_bins), np.array_split(correct[order], n_bins))
    return float(sum(len(c) * abs(c.mean() - a.mean()) for c, a in parts) / len(confidence))


def _numpy_classwise_ece(probs: np.ndarray, target: np.ndarray, n_bins: int) -> float:
    errors = []
    for label in range(C):
        p, y = probs[:, label], (target == label).astype(float)
        cell = np.floor(p.astype(np.float64) * n_bins)
        errors.append(sum(abs((p - y)[cell == b].sum()) for b in range(n_bins)) / len(p))
    return float(np.mean(errors))


def _numpy_aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    wrong = 1 - correct[np.argsort(-confidence)].astype(float)
    return float(np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))


def _numpy_coverage(confidence: np.ndarray, correct: np.ndarray, risk: float) -> float:
    kept = [confidence >= threshold for threshold in confidence]
    coverage = max([k.mean() for k in kept if 1 - correct[k].mean() <= risk], default=0.0)
    assert 0 < coverage < 1  # else the case would say little
    return float(coverage)


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(N, C, generator=generator)
    target = torch.randint(C, (N,), generator=generator)
    probs = logits.double().softmax(-1)
    confidence, prediction = (x.numpy() for x in probs.max(-1))
    y, p = target.numpy(), probs.numpy()
    correct = prediction == y
    labelled = {"logits": logits, "target": target}

    # some samples without a class: they must change nothing
    mixed = target.clone()
    mixed[::3] = -1
    keep = mixed.numpy() >= 0

    score = torch.randn(N, generator=generator).mul(3).round() / 3  # with ties
    is_id = torch.rand(N, generator=generator) < 0.6
    fpr_id, tpr_id, _ = roc_curve(is_id.numpy(), score.numpy(), drop_intermediate=False)
    fpr_ood, tpr_ood, _ = roc_curve(~is_id.numpy(), -score.numpy(), drop_intermediate=False)
    tm_error = partial(multiclass_calibration_error, probs.float(), target, num_classes=C)
    scaled = {t: (logits.double() / t).softmax(-1).float() for t in (0.4, 2.5)}

    index = torch.randperm(N, generator=generator)

    # classes that the logits say something of: else nothing is worth selecting
    likely = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    right = prediction == likely.numpy()
    likely_mixed = torch.where(torch.from_numpy(keep), likely, -1)

    # their exactness has a test of its own; here it is about batches and processes
    binned = m.BinnedDetection(low=-4, high=4, n_bins=50)
    binned.update(score, is_id)
    binned_adaptive = m.BinnedAdaptiveCalibrationError(cells=100)
    binned_adaptive.update(logits, target)
    binned_selective = m.BinnedSelectivePrediction(risk=0.2, cells=100)
    binned_selective.update(logits[keep], likely[keep])

    records = {
        "index": index,
        "target": target,
        "confidence": torch.from_numpy(confidence).float(),
        "correct": torch.from_numpy(correct),
    }
    order = index.argsort()
    dtypes = {"target": torch.int64, "confidence": torch.float32, "correct": torch.bool}

    classwise = m.ClasswiseGaps(C, n_bins=8, n_groups=3)  # its values are tested by themselves; here, that they add up
    classwise.update(index, **labelled)
    return [
        Case("brier", m.BrierScore, labelled, _numpy_brier(p, y)),
        Case(
            "brier_mixed", m.BrierScore, {"logits": logits, "target": mixed}, _numpy_brier(p[keep], mixed.numpy()[keep])
        ),
        Case("nll", m.NegativeLogLikelihood, labelled, -np.log(p[np.arange(N), y]).mean()),
        Case("ece", m.CalibrationError, labelled, tm_error(n_bins=15, norm="l1")),
        Case("rmsce", partial(m.CalibrationError, norm="l2", n_bins=9), labelled, tm_error(n_bins=9, norm="l2")),
        Case("mce", m.MaximumCalibrationError, labelled, tm_error(n_bins=15, norm="max")),
        Case(
            "ece_scaled",
            partial(m.CalibrationError, temperature=2.5),
            labelled,
            multiclass_calibration_error(scaled[2.5], target, num_classes=C),
        ),
        Case(
            "mce_scaled",
            partial(m.MaximumCalibrationError, temperature=0.4),
            labelled,
            multiclass_calibration_error(scaled[0.4], target, num_classes=C, norm="max"),
        ),
        Case("adaptive_ece", m.AdaptiveCalibrationError, labelled, _numpy_adaptive_ece(confidence, correct, 15)),
        Case(
            "classwise_ece",
            partial(m.ClasswiseCalibrationError, num_classes=C, n_bins=8),
            labelled,
            _numpy_classwise_ece(p, y, 8),
        ),
        Case(
            "classwise_gaps",
            partial(m.ClasswiseGaps, num_classes=C, n_bins=8, n_groups=3),
            {"index": index, **labelled},
            classwise.compute(),
        ),
        Case("aurc", m.AURC, labelled, _numpy_aurc(confidence, correct)),
        Case(
            "coverage_at_risk",
            partial(m.CoverageAtRisk, risk=0.23),
            {"logits": logits, "target": likely},
            _numpy_coverage(confidence, right, 0.23),
        ),
        Case(
            "coverage_at_risk_mixed",
            partial(m.CoverageAtRisk, risk=0.23),
            {"logits": logits, "target": likely_mixed},
            _numpy_coverage(confidence[keep], right[keep], 0.23),
        ),
        Case("fpr95_id", m.FPR95, {"score": score, "is_id": is_id}, fpr_id[np.argmax(tpr_id >= 0.95)]),
        Case(
            "fpr95_ood",
            partial(m.FPR95, positive="ood"),
            {"score": score, "is_id": is_id},
            fpr_ood[np.argmax(tpr_ood >= 0.95)],
        ),
        Case(
            "binned_detection",
            partial(m.BinnedDetection, low=-4, high=4, n_bins=50),
            {"score": score, "is_id": is_id},
            binned.compute(),
        ),
        Case(
            "binned_adaptive_ece",
            partial(m.BinnedAdaptiveCalibrationError, cells=100),
            labelled,
            binned_adaptive.compute(),
        ),
        Case(
            "binned_selective",
            partial(m.BinnedSelectivePrediction, risk=0.2, cells=100),
            {"logits": logits, "target": likely_mixed},
            binned_selective.compute(),
        ),
        Case(
            "records",
            partial(m.SampleRecords, dtypes),
            records,
            {"index": torch.arange(N), **{name: records[name][order] for name in dtypes}},
        ),
    ]
