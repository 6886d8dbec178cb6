"""Evaluators against torchmetrics and scikit-learn, on random logits from end to end."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from lightning_vlmq import metrics, statistics
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EvalSet, TensorImages
from lightning_vlmq.evaluation.evaluators import (
    ClassificationEvaluator,
    OODEvaluator,
    SpuriousEvaluator,
    classwise_rows,
    headline,
)
from lightning_vlmq.evaluation.quantities import Resampled
from lightning_vlmq.metrics import OOD_SCORES, ScoreInputs, per_sample

CLASSES = 7


def make_set(name, role, n, **kwargs):
    return EvalSet(name, role, TensorImages(torch.zeros(n, 3, 1, 1, dtype=torch.uint8)), **kwargs)


def make_records(n, ood=False, shift=0.0):
    cosine = torch.rand(n, CLASSES) * 0.4
    target = torch.full((n,), -1) if ood else torch.randint(0, CLASSES, (n,))
    if not ood:
        cosine[torch.arange(n), target] += 0.2 - shift
    logits = 15 * cosine
    columns = {"index": torch.arange(n), "target": target, **per_sample(logits, target)}
    columns |= {s: OOD_SCORES[s](ScoreInputs(cosine, logits)) for s in ("mcm", "energy")}
    return columns, logits, target


def by_metric(rows):
    return {(r.dataset, r.score, r.metric): r for r in rows}


def test_classification_rows_equal_torchmetrics():
    s = make_set("a", "id", 300)
    (mine, logits, target), (theirs, _, _) = make_records(300), make_records(300, shift=0.1)
    rows = by_metric(ClassificationEvaluator().rows([s], {"a": mine}, {"a": theirs}))
    probs = logits.softmax(1)
    value = {m: rows["a", "", m].value for m in ("top1", "top5", "ece", "nll", "brier", "agreement", "delta_top1")}
    for k, metric in ((1, "top1"), (5, "top5")):
        expected = multiclass_accuracy(logits, target, CLASSES, average="micro", top_k=k)
        assert value[metric] == pytest.approx(float(expected), abs=1e-6)
    assert value["ece"] == pytest.approx(float(multiclass_calibration_error(probs, target, CLASSES)), abs=1e-6)
    assert value["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), abs=1e-6)
    one_hot = torch.nn.functional.one_hot(target, CLASSES)
    assert value["brier"] == pytest.approx(float((probs - one_hot).square().sum(1).mean()), abs=1e-6)
    assert value["agreement"] == pytest.approx(float((mine["prediction"] == theirs["prediction"]).float().mean()))
    accuracy_f = float(theirs["correct"].float().mean())
    assert value["delta_top1"] == pytest.approx((accuracy_f - value["top1"]) / accuracy_f, abs=1e-6)
    p = value["top1"]
    assert rows["a", "", "top1"].stderr == pytest.approx(np.sqrt(p * (1 - p) / 300), rel=0.35)
    assert rows["a", "", "top1"].n == 300


def test_selective_and_flip_rows_are_their_definitions():
    s = make_set("a", "id", 250)
    mine, theirs = make_records(250)[0], make_records(250, shift=0.1)[0]
    rows = by_metric(ClassificationEvaluator(risk=0.2).rows([s], {"a": mine}, {"a": theirs}))
    value = {metric: row.value for (_, _, metric), row in rows.items()}
    order = mine["confidence"].argsort(descending=True)
    risk = 1 - mine["correct"][order].double().cumsum(0) / torch.arange(1, 251)
    assert value["aurc"] == pytest.approx(float(risk.mean()))
    assert value["coverage_at_risk_20"] == pytest.approx(max(k + 1 for k in range(250) if risk[k] <= 0.2) / 250)
    bins = (mine["confidence"].double() * 15).floor()
    gap = mine["correct"].double() - mine["confidence"].double()
    assert value["mce"] == pytest.approx(max(abs(float(gap[bins == b].mean())) for b in bins.unique()), abs=1e-6)
    was, now = theirs["correct"], mine["correct"]
    assert value["flips"] == pytest.approx(1 - value["agreement"])
    assert value["flips_broken"] == pytest.approx(float((was & ~now).double().mean()))
    assert value["flips_repaired"] == pytest.approx(float((now & ~was).double().mean()))
    assert value["top1"] - theirs["correct"].double().mean().item() == pytest.approx(
        value["flips_repaired"] - value["flips_broken"]
    )


@pytest.mark.parametrize("metric", ["top1", "ece", "mce", "adaptive_ece", "aurc", "coverage_at_risk_5", "delta_ece"])
def test_standard_errors_are_the_general_bootstrap_s(metric):
    s = make_set("a", "id", 200)
    mine, theirs = make_records(200)[0], make_records(200, shift=0.1)[0]
    rows = by_metric(ClassificationEvaluator(n_resamples=600).rows([s], {"a": mine}, {"a": theirs}))
    functions = {
        "top1": lambda c, k: k.double().mean(-1),
        "ece": metrics.calibration_error,
        "mce": partial(metrics.calibration_error, norm="max"),
        "adaptive_ece": partial(metrics.calibration_error, binning="mass"),
        "aurc": metrics.aurc,
        "coverage_at_risk_5": partial(metrics.coverage_at_risk, risk=0.05),
        "delta_ece": metrics.calibration_error,
    }
    columns_q, columns_f = ([r["confidence"], r["correct"]] for r in (mine, theirs))
    if metric == "delta_ece":
        found = statistics.paired_bootstrap(
            functions[metric], columns_f, columns_q, 600, seed=5, combine=metrics.relative_change
        )
    else:
        found = statistics.bootstrap(functions[metric], *columns_q, n_resamples=600, seed=5)
    assert rows["a", "", metric].value == pytest.approx(found.estimate)
    assert rows["a", "", metric].stderr == pytest.approx(found.stderr, rel=0.2)


def test_classwise_rows_are_errors_and_their_change():
    sets = [make_set("a", "id", 90), make_set("b", "corruption", 90)]
    mine, theirs = (torch.tensor(values, dtype=torch.float64) for values in ([0.2, 0.21, 0.19], [0.1, 0.11, 0.1]))
    rows = by_metric(classwise_rows(sets, {"a": mine}, {"a": theirs}))
    assert set(rows) == {("a", "", "classwise_ece"), ("a", "", "delta_classwise_ece")}
    assert rows["a", "", "classwise_ece"].value == 0.2
    assert rows["a", "", "classwise_ece"].stderr == pytest.approx(0.01)  # sqrt(1/2 * 2 * 0.01^2)
    assert rows["a", "", "delta_classwise_ece"].value == pytest.approx(-1.0)


def test_ood_rows_equal_scikit_learn():
    sets = [make_set("in", "id", 200), make_set("near", "near_ood", 90), make_set("far", "far_ood", 70)]
    records = {
        "in": make_records(200)[0],
        "near": make_records(90, ood=True)[0],
        "far": make_records(70, ood=True)[0],
    }
    rows = by_metric(OODEvaluator().rows(sets, records, None))
    for name in ("near", "far"):
        for score in ("mcm", "energy"):
            inside, outside = records["in"][score].double().numpy(), records[name][score].double().numpy()
            labels = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
            scores = np.r_[inside, outside]
            expected = {
                "auroc": roc_auc_score(labels, scores),
                "aupr_in": average_precision_score(labels, scores),
                "aupr_out": average_precision_score(1 - labels, -scores),
            }
            fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
            expected["fpr95"] = fpr[np.argmax(tpr >= 0.95)]
            fpr, tpr, _ = roc_curve(1 - labels, -scores, drop_intermediate=False)
            expected["fpr95_openood"] = fpr[np.argmax(tpr >= 0.95)]
            for metric, value in expected.items():
                assert rows[name, score, metric].value == pytest.approx(value, abs=1e-6), (name, score, metric)
                assert rows[name, score, metric].stderr > 0
    assert not any(r.metric.startswith("delta") for r in rows.values())


def test_spurious_rows_equal_the_definitions():
    sets = [make_set("b_common", "spurious", 150), make_set("b_counter", "spurious", 120)]
    f = {"b_common": make_records(150)[0], "b_counter": make_records(120, shift=0.1)[0]}
    q = {"b_common": make_records(150, shift=0.05)[0], "b_counter": make_records(120, shift=0.15)[0]}
    rows = by_metric(SpuriousEvaluator().rows(sets, q, f))

    def accuracy(records, name):
        return records[name]["correct"].double().mean().item()

    gap = {m: 1 - accuracy(r, "b_counter") / accuracy(r, "b_common") for m, r in (("f", f), ("q", q))}
    delta = {name: 1 - accuracy(q, name) / accuracy(f, name) for name in f}
    assert rows["b", "", "rsg"].value == pytest.approx(gap["q"])
    assert rows["b", "", "delta_rsg"].value == pytest.approx(gap["q"] - gap["f"])
    assert rows["b", "", "vuln_add"].value == pytest.approx(delta["b_counter"] - delta["b_common"])
    assert all(r.stderr > 0 and r.n == 270 for r in rows.values())


def test_identical_models_change_nothing():
    sets = [make_set("in", "id", 80), make_set("out", "near_ood", 50)]
    records = {"in": make_records(80)[0], "out": make_records(50, ood=True)[0]}
    for evaluator in (ClassificationEvaluator(), OODEvaluator()):
        changes = [r for r in evaluator.rows(sets, records, records) if r.metric.startswith("delta_")]
        assert changes and all(r.value == 0 and r.stderr == 0 for r in changes)


def test_one_sample_gives_values_and_no_crash():
    sets = [make_set("in", "id", 1), make_set("out", "near_ood", 1)]
    records = {"in": make_records(1)[0], "out": make_records(1, ood=True)[0]}
    rows = ClassificationEvaluator().rows(sets, records, None) + OODEvaluator().rows(sets, records, None)
    assert {r.metric for r in rows} >= {"top1", "ece", "auroc", "fpr95"}
    assert all(np.isfinite(r.value) for r in rows)


def test_same_seed_same_standard_errors():
    sets = [make_set("in", "id", 60)]
    records = {"in": make_records(60)[0]}
    assert ClassificationEvaluator().rows(sets, records, None) == ClassificationEvaluator().rows(sets, records, None)


def test_headline_averages_over_a_role():
    sets = [make_set(f"c{i}", "corruption", 40, corruption="c", severity=i + 1) for i in range(3)]
    records = {s.name: make_records(40)[0] for s in sets}
    rows = ClassificationEvaluator().rows(sets, records, None)
    expected = np.mean([records[s.name]["correct"].double().mean().item() for s in sets])
    assert headline(rows)["corruption/top1"] == pytest.approx(expected)


def test_spurious_sets_need_a_partner():
    with pytest.raises(VLMQError, match="b_counter"):
        SpuriousEvaluator().rows([make_set("b_common", "spurious", 5)], {}, None)
    with pytest.raises(VLMQError, match="n_resamples"):
        Resampled(1)
    with pytest.raises(VLMQError, match="risk"):
        ClassificationEvaluator(risk=5)
