"""Evaluators against torchmetrics and scikit-learn, on random logits from end to end."""

from functools import partial

import numpy as np
import pytest
import torch
from cases.evaluation import aligned
from cases.evaluation import rows as rows_from
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from lightning_vlmq import metrics, statistics
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EvalSet, TensorImages
from lightning_vlmq.evaluation.evaluators import ClassificationEvaluator, OODEvaluator, SpuriousEvaluator
from lightning_vlmq.evaluation.measures import METRICS
from lightning_vlmq.evaluation.rows import headline
from lightning_vlmq.metrics import OOD_SCORES, ScoreInputs, per_sample
from lightning_vlmq.statistics import Statistics

CLASSES = 7


@pytest.fixture(autouse=True)
def same_samples():
    torch.manual_seed(1)


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
    columns["kl"] = torch.rand(n)
    return columns, logits, target


def by_metric(rows):
    return {(r.dataset, r.score, r.metric): r for r in rows}


def test_classification_rows_equal_torchmetrics():
    s = make_set("a", "id", 300)
    (mine, logits, target), (theirs, _, _) = make_records(300), make_records(300, shift=0.1)
    rows = by_metric(rows_from(ClassificationEvaluator(), [s], {"a": mine}, {"a": theirs}))
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
    rows = by_metric(rows_from(ClassificationEvaluator(), [s], {"a": mine}, {"a": theirs}, Statistics(risk=0.2)))
    value = {metric: row.value for (_, _, metric), row in rows.items()}
    order = mine["confidence"].argsort(descending=True)
    risk = 1 - mine["correct"][order].double().cumsum(0) / torch.arange(1, 251)
    assert value["aurc"] == pytest.approx(float(risk.mean()))
    assert value["coverage_at_risk"] == pytest.approx(max(k + 1 for k in range(250) if risk[k] <= 0.2) / 250)
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


@pytest.mark.parametrize("metric", ["top1", "ece", "mce", "adaptive_ece", "aurc", "coverage_at_risk", "delta_ece"])
def test_standard_errors_are_the_general_bootstrap_s(metric):
    s = make_set("a", "id", 200)
    mine, theirs = make_records(200)[0], make_records(200, shift=0.1)[0]
    rows = by_metric(
        rows_from(
            ClassificationEvaluator(),
            [s],
            {"a": mine},
            {"a": theirs},
            Statistics(n_resamples=600, n_resamples_ranking=600),
        )
    )
    functions = {
        "top1": lambda c, k: k.double().mean(-1),
        "ece": metrics.calibration_error,
        "mce": partial(metrics.calibration_error, norm="max"),
        "adaptive_ece": partial(metrics.calibration_error, binning="mass"),
        "aurc": metrics.aurc,
        "coverage_at_risk": partial(metrics.coverage_at_risk, risk=0.05),
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


def test_ood_rows_equal_scikit_learn():
    sets = [make_set("in", "id", 200), make_set("near", "near_ood", 90), make_set("far", "far_ood", 70)]
    records = {
        "in": make_records(200)[0],
        "near": make_records(90, ood=True)[0],
        "far": make_records(70, ood=True)[0],
    }
    rows = by_metric(rows_from(OODEvaluator(), sets, records, None))
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
    rows = by_metric(rows_from(SpuriousEvaluator(), sets, q, f))

    def accuracy(records, name):
        return records[name]["correct"].double().mean().item()

    gap = {m: 1 - accuracy(r, "b_counter") / accuracy(r, "b_common") for m, r in (("f", f), ("q", q))}
    delta = {name: 1 - accuracy(q, name) / accuracy(f, name) for name in f}
    assert rows["b", "", "rsg"].value == pytest.approx(gap["q"])
    assert rows["b", "", "delta_rsg"].value == pytest.approx(gap["q"] - gap["f"])
    assert rows["b", "", "vuln_add"].value == pytest.approx(delta["b_counter"] - delta["b_common"])
    assert all(r.stderr > 0 and r.n == 270 for (_, _, name), r in rows.items() if "rsg" in name or name == "vuln_add")


def test_identical_models_change_nothing():
    sets = [make_set("in", "id", 80), make_set("out", "near_ood", 50)]
    records = {"in": make_records(80)[0], "out": make_records(50, ood=True)[0]}
    for evaluator in (ClassificationEvaluator(), OODEvaluator()):
        rows = by_metric(rows_from(evaluator, sets, records, records))
        changes = {key: r for key, r in rows.items() if r.metric.startswith("delta_")}
        assert changes and all(r.value == 0 for r in changes.values())
        for (dataset, score, name), row in changes.items():
            metric = name.removeprefix("delta_")
            own = rows[dataset, score, metric].value if METRICS[metric].is_relative else 1.0
            n = 80 if dataset == "in" else 50
            assert row.stderr == (pytest.approx(1 / (n + 2) / own) if METRICS[metric].is_share else 0), name


def test_none_differ_is_no_certainty():
    """All right, and the same after quantizing: the error is that of Agresti & Min's table, as closed form, not 0."""
    n = 300
    records = make_records(n)[0]
    records |= {name: torch.ones(n, dtype=torch.bool) for name in ("correct", "correct_top5")}
    rows = by_metric(rows_from(ClassificationEvaluator(), [make_set("a", "id", n)], {"a": records}, {"a": records}))
    cells = np.array([[n, 0], [0, 0]]) + 0.5  # right or wrong before and after, half a sample more in each
    shares = cells / cells.sum()
    variance = (shares[0, 1] + shares[1, 0] - (shares[0, 1] - shares[1, 0]) ** 2) / cells.sum()
    assert rows["a", "", "delta_top1"].stderr == pytest.approx(variance**0.5)
    assert rows["a", "", "top1"].stderr == pytest.approx(variance**0.5)
    assert rows["a", "", "flips"].value == 0 < rows["a", "", "flips"].stderr
    one = {**records, "correct": torch.arange(n) > 0}  # one flip: the bootstrap's own
    rows = by_metric(rows_from(ClassificationEvaluator(), [make_set("a", "id", n)], {"a": one}, {"a": records}))
    assert rows["a", "", "delta_top1"].stderr == pytest.approx(1 / n, rel=0.1)


def test_one_sample_gives_values_and_no_crash():
    sets = [make_set("in", "id", 1), make_set("out", "near_ood", 1)]
    records = {"in": make_records(1)[0], "out": make_records(1, ood=True)[0]}
    rows = rows_from(ClassificationEvaluator(), sets, records, None) + rows_from(OODEvaluator(), sets, records, None)
    assert {r.metric for r in rows} >= {"top1", "ece", "auroc", "fpr95"}
    assert all(np.isfinite(r.value) for r in rows)


def test_same_seed_same_standard_errors():
    sets = [make_set("in", "id", 60)]
    records = {"in": make_records(60)[0]}
    assert rows_from(ClassificationEvaluator(), sets, records, None) == rows_from(
        ClassificationEvaluator(), sets, records, None
    )


def test_headline_averages_over_a_role():
    sets = [make_set(f"c{i}", "corruption", 40, corruption="c", severity=i + 1) for i in range(3)]
    records = {s.name: make_records(40)[0] for s in sets}
    sets.append(make_set("corruptions_clean", "corruption", 40))  # an original counts in no mean
    records["corruptions_clean"] = make_records(40, shift=-1)[0]
    rows = rows_from(ClassificationEvaluator(), sets, records, None, means=True)
    assert {(r.dataset, r.metric) for r in rows if r.dataset == "corruptions_clean"} == {("corruptions_clean", "top1")}
    expected = np.mean([records[s.name]["correct"].double().mean().item() for s in sets[:-1]])
    assert headline(rows)["corruption/top1"] == pytest.approx(expected)


def test_spurious_sets_need_a_partner():
    with pytest.raises(VLMQError, match="b_counter"):
        rows_from(SpuriousEvaluator(), [make_set("b_common", "spurious", 5)], {"b_common": make_records(5)[0]}, None)


@pytest.mark.parametrize("field", ["n_bins", "n_resamples", "n_resamples_ranking", "n_groups", "seed", "risk"])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(VLMQError, match=field):
        Statistics(**{field: -1})


def test_sets_of_a_group_are_resampled_together_and_others_not():
    """The same records twice: their difference has no spread if they are of the same scenes, else that of two samples."""
    records, same = make_records(300)[0], {"group": "g"}
    for about, together in ((same, True), ({}, False)):
        sets = [make_set(f"b_{name}", "spurious", 300, **about) for name in ("common", "counter")]
        rows = by_metric(rows_from(SpuriousEvaluator(), sets, {s.name: records for s in sets}, None))
        assert rows["b", "", "rsg"].value == 0
        assert (rows["b", "", "rsg"].stderr == 1 / 302) == together


def test_which_resamples_are_drawn_depends_on_nothing_else():
    """A run's rows stay the same to the last bit, whatever other runs and sets it is evaluated with."""
    sets = [make_set("in", "id", 90), make_set("out", "near_ood", 60), make_set("s", "shift", 50)]

    def run(shift):
        return {s.name: make_records(len(s.images), s.name == "out", shift)[0] for s in sets}

    reference, own, other = run(0.0), run(0.1), run(0.2)
    for evaluator in (ClassificationEvaluator(), OODEvaluator()):
        alone = evaluator.estimates(aligned(sets[:2], reference, own))
        among = evaluator.estimates(aligned(sets[::-1], reference, other, own))
        for measure, estimate in alone.items():
            assert np.array_equal(estimate.value, among[measure].value[[0, 2]]), measure
            assert np.array_equal(estimate.replicates, among[measure].replicates[:, [0, 2]]), measure


def test_auroc_s_standard_error_is_delong_s():
    sets = [make_set("in", "id", 400), make_set("near", "near_ood", 300)]
    f, q = ({"in": make_records(400)[0], "near": make_records(300, ood=True)[0]} for _ in range(2))
    row = by_metric(rows_from(OODEvaluator(), sets, q, f))["near", "mcm", "auroc"]
    expected = statistics.delong_standard_error(q["in"]["mcm"], q["near"]["mcm"])
    assert row.stderr == pytest.approx(expected, rel=0.1)
    found = OODEvaluator().estimates(aligned(sets, f, q))
    (auroc,) = (e for m, e in found.items() if (m.metric, m.dataset, m.score) == ("auroc", "near", "mcm"))
    pair = statistics.delong(f["in"]["mcm"], f["near"]["mcm"], q["in"]["mcm"], q["near"]["mcm"])
    change = auroc.replicates[:, 1] - auroc.replicates[:, 0]
    assert change.std(ddof=1) == pytest.approx(pair.stderr, rel=0.1)
    assert auroc.value[1] - auroc.value[0] == pytest.approx(pair.difference)
