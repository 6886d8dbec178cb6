"""Comparisons against full precision: points, intervals and tests against scipy, scikit-learn and the metrics package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases.study import grid, make_run, write_study
from scipy.stats import false_discovery_control, norm
from sklearn.metrics import roc_auc_score

from lightning_vlmq.evaluation.measures import METRICS, Measure
from lightning_vlmq.metrics.functional import (
    augrc,
    aurc,
    bin_gaps,
    calibration_error,
    coverage_at_risk,
    debiased_error,
    gap_variances,
)
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import Statistics, bootstrap_replicates, delong, paired_bootstrap
from lightning_vlmq.study.analysis.change import FULL, average_effect
from lightning_vlmq.study.analysis.comparison import StudyAnalysis, analyse
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.setting import Setting

W4 = Setting("minmax", 4, 8, "vision")
KEYS = grid(methods=["minmax"], bits=[(4, 8)], scopes=["vision"])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ResultsStore:
    return write_study(tmp_path_factory.mktemp("study"), KEYS, size=0.3)


@pytest.fixture(scope="module")
def analysis(store) -> StudyAnalysis:
    return analyse(StudyResults.load(store.root))


def column(store: ResultsStore, method: str, role: str, name: str, vlm: str = "vit_clean") -> dict[str, np.ndarray]:
    """The samples' column by data set, read independently of the code under test."""
    run_id = next(i for i in store.run_ids() if i.startswith(f"{vlm}-{method}-"))
    samples = store.samples(run_id).sort_values("index")
    samples = samples[samples["role"] == role]
    return {str(dataset): part[name].to_numpy() for dataset, part in samples.groupby("dataset", observed=True)}


@pytest.mark.parametrize("role", ["id", "corruption", "shift"])
@pytest.mark.parametrize(
    ("metric", "name"), [("top1", "correct"), ("top5", "correct_top5"), ("nll", "nll"), ("brier", "brier")]
)
def test_means_and_their_paired_errors(store, analysis, role, metric, name):
    found = analysis.comparisons["vit_clean", W4, Measure(metric, role)]
    full, quantized = (
        np.mean([v.astype(float) for v in column(store, method, role, name).values()], axis=0)
        for method in ("fp32", "minmax")
    )  # every set of a role is of the same images here, so the mean over sets is one number an image
    assert found.value == pytest.approx(quantized.mean(), abs=1e-6)
    assert found.reference == pytest.approx(full.mean(), abs=1e-6)
    assert found.change.estimate == pytest.approx((quantized - full).mean(), abs=1e-6)
    assert found.effect.estimate == pytest.approx((full.mean() - quantized.mean()) / full.mean(), abs=1e-6)
    if role != "shift":  # renditions in the synthetic study are of different images
        assert found.stderr == pytest.approx(quantized.std() / len(quantized) ** 0.5, rel=0.12)
        assert found.change.stderr == pytest.approx((quantized - full).std() / len(full) ** 0.5, rel=0.12)


def test_agreement_is_against_full_precision_and_not_tested(store, analysis):
    found = analysis.comparisons["vit_clean", W4, Measure("agreement", "id")]
    full, quantized = (column(store, method, "id", "prediction")["concepts"] for method in ("fp32", "minmax"))
    assert found.value == pytest.approx((full == quantized).mean())
    assert found.change is None and np.isnan(found.p_value)
    assert analysis.comparisons["vit_clean", FULL, Measure("agreement", "id")].value == 1


@pytest.mark.parametrize(("metric", "binning"), [("ece", "width"), ("adaptive_ece", "mass")])
def test_errors_are_shown_as_they_are_and_compared_without_their_bias(store, analysis, metric, binning):
    found = analysis.comparisons["vit_clean", W4, Measure(metric, "id")]
    twin = analysis.comparisons["vit_clean", W4, Measure(f"{metric}_debiased", "id")]
    columns = {
        m: [torch.tensor(column(store, m, "id", n)["concepts"]) for n in ("confidence", "correct")]
        for m in ("fp32", "minmax")
    }
    assert found.value == pytest.approx(float(calibration_error(*columns["minmax"], binning=binning)), abs=1e-6)
    debiased = {}
    for method, own in columns.items():
        gaps = bin_gaps(*own, binning=binning)
        debiased[method] = float(debiased_error(gaps.mean(0), gap_variances(gaps)))
    assert twin.value == pytest.approx(debiased["minmax"], abs=1e-6)
    assert twin.change.estimate == pytest.approx(debiased["minmax"] - debiased["fp32"], abs=1e-6)
    assert twin.p_value == pytest.approx(2 * norm.sf(abs(twin.change.estimate) / twin.change.stderr))
    assert found.change == twin.change and (found.p_value, found.q_value) == (twin.p_value, twin.q_value)
    assert found.effect.estimate == pytest.approx(-twin.change.estimate / found.reference)
    assert found.effect.low < found.effect.estimate < found.effect.high
    tested = [
        c.p_value for (_, _, m), c in analysis.comparisons.items() if m.tested_by == m and not np.isnan(c.p_value)
    ]
    assert analysis.n_tests == len(tested) < sum(not np.isnan(c.p_value) for c in analysis.comparisons.values())


def test_what_has_no_interval_that_holds_is_not_tested(analysis):
    found = analysis.comparisons["vit_clean", W4, Measure("mce", "id")]
    assert found.change.estimate == pytest.approx(found.value - found.reference)
    assert all(np.isnan(x) for x in (found.change.stderr, found.change.low, found.p_value, found.q_value))


def test_adaptive_ece_value(store, analysis):
    confidence, correct = (
        torch.tensor(column(store, "minmax", "id", n)["concepts"]) for n in ("confidence", "correct")
    )
    found = analysis.comparisons["vit_clean", W4, Measure("adaptive_ece", "id")]
    assert found.value == pytest.approx(float(calibration_error(confidence, correct, binning="mass")), abs=1e-6)
    spread = bootstrap_replicates(
        lambda a, b: calibration_error(a, b, binning="mass"), confidence, correct, n_resamples=300, seed=9
    )
    assert found.stderr == pytest.approx(float(spread.std()), rel=0.25)


@pytest.mark.parametrize("score", ["mcm", "energy"])
def test_auroc_of_a_data_set_has_delong_s_error(store, analysis, score):
    scores = {
        method: [column(store, method, "id", score)["concepts"], column(store, method, "far_ood", score)["digits"]]
        for method in ("fp32", "minmax")
    }
    found = analysis.comparisons["vit_clean", W4, Measure("auroc", "far_ood", "digits", score)]
    is_id = np.repeat([1, 0], [len(side) for side in scores["minmax"]])
    assert found.value == pytest.approx(roc_auc_score(is_id, np.concatenate(scores["minmax"])))
    expected = delong(*(torch.tensor(side) for side in scores["fp32"] + scores["minmax"]))
    assert found.change.estimate == pytest.approx(expected.difference)
    assert found.change.stderr == pytest.approx(expected.stderr, rel=0.1)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(expected.difference) / found.change.stderr))


def test_auroc_of_a_role_is_the_mean_and_its_bootstrap_agrees_with_delong(analysis):
    role = analysis.comparisons["vit_clean", W4, Measure("auroc", "far_ood", "", "mcm")]
    sets = [
        analysis.comparisons["vit_clean", W4, Measure("auroc", "far_ood", name, "mcm")]
        for name in ("digits", "textures")
    ]
    assert role.value == pytest.approx(np.mean([c.value for c in sets]))
    near = analysis.comparisons["vit_clean", W4, Measure("auroc", "near_ood", "", "mcm")]
    alone = analysis.comparisons["vit_clean", W4, Measure("auroc", "near_ood", "novel", "mcm")]
    assert near.value == pytest.approx(alone.value)
    assert near.change.stderr == pytest.approx(alone.change.stderr, rel=0.2)


def test_spurious_gap_and_vulnerability(store, analysis):
    accuracy = {
        (method, group): column(store, method, "spurious", "correct")[f"backgrounds_{group}"].mean()
        for method in ("fp32", "minmax")
        for group in ("common", "counter")
    }
    gap = {m: (accuracy[m, "common"] - accuracy[m, "counter"]) / accuracy[m, "common"] for m in ("fp32", "minmax")}
    found = analysis.comparisons["vit_clean", W4, Measure("rsg", "spurious")]
    assert found.value == pytest.approx(gap["minmax"]) and found.reference == pytest.approx(gap["fp32"])
    assert found.effect.estimate == pytest.approx(gap["minmax"] - gap["fp32"])
    delta = {g: (accuracy["fp32", g] - accuracy["minmax", g]) / accuracy["fp32", g] for g in ("common", "counter")}
    vulnerability = analysis.comparisons["vit_clean", W4, Measure("vuln_add", "spurious")]
    assert vulnerability.change.estimate == pytest.approx(delta["counter"] - delta["common"])


def test_p_values_are_corrected_over_the_whole_grid(analysis):
    table = analysis.comparisons.table()
    tested = table[table["p_value"].notna() & (table["tested_by"] == table["metric"])]
    assert analysis.n_tests == len(tested) > 40
    np.testing.assert_allclose(tested["q_value"], false_discovery_control(tested["p_value"]))
    others = table[table["tested_by"] != table["metric"]]
    assert set(others["metric"]) == {"ece", "adaptive_ece", "classwise_ece"}
    assert table.loc[table["method"] == "fp32", "p_value"].isna().all()


def test_the_mean_effect_has_the_interval_of_shared_resamples(analysis):
    measure = Measure("top1", "id")
    both = analysis.changes(measure, method="minmax")
    assert len(both) == 2
    mean = average_effect(both)
    assert mean.estimate == pytest.approx(np.mean([c.effect.estimate for c in both]))
    assert mean.low < mean.estimate < mean.high
    assert mean.stderr < max(c.effect.stderr for c in both)


def test_a_run_that_changes_nothing_is_not_significant(tmp_path):
    full = RunKey("vit_clean", "clean", "none", "fp32", 32, 32, 0)
    rows, samples, curves = make_run(full, "full", size=0.05)
    rows = rows[~rows["metric"].str.startswith("classwise_ece")]  # whose change a run itself has to say
    store = ResultsStore(tmp_path)
    store.write("full", rows, samples, curves)
    same = {"run_id": "same", "method": "minmax", "scope": "vision", "weight_bits": 8, "act_bits": 8}
    store.write("same", rows.assign(**same), samples, curves)
    analysis = analyse(StudyResults.load(tmp_path))
    changes = [c for c in analysis.comparisons.values() if c.change is not None]
    assert changes and all(c.change.estimate == 0 for c in changes)
    tested = [c for (_, _, measure), c in analysis.comparisons.items() if c.change and measure.info.is_tested]
    assert len(tested) < len(changes) and all(c.p_value == 1 and c.q_value == 1 for c in tested)


def test_seeds_are_averaged(tmp_path):
    keys = [key for seed in (0, 1) for key in grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], seed)]
    store = write_study(tmp_path, keys, size=0.05)
    analysis = analyse(StudyResults.load(tmp_path))
    found = analysis.comparisons["vit_clean", W4, Measure("top1", "id")]
    assert found.n_seeds == 2 and len(analysis.settings) == 1
    values = [store.samples(i).query("role == 'id'")["correct"].mean() for i in store.run_ids() if "minmax" in i]
    assert len(values) == 2 and values[0] != values[1]
    assert found.value == pytest.approx(np.mean(values))
    bins = analysis.diagnostics["vit_clean", W4].bins
    assert float(bins.count.sum()) == 2 * 80


def test_a_data_set_that_one_run_lacks_is_undefined_there_alone(tmp_path):
    store = ResultsStore(tmp_path)
    for key in grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision"]):
        rows, samples, curves = make_run(key, key.bits, size=0.05)
        if key.weight_bits == 4:
            samples = samples[~samples["dataset"].isin(["inverted", "digits"])]
        store.write(key.bits, rows, samples, curves)
    analysis = analyse(StudyResults.load(tmp_path))
    w8 = Setting("minmax", 8, 8, "vision")
    for measure in (Measure("top1", "shift"), Measure("auroc", "far_ood", "", "mcm")):
        assert ("vit_clean", W4, measure) not in analysis.comparisons
        assert not np.isnan(analysis.comparisons["vit_clean", w8, measure].value)
    assert ("vit_clean", W4, Measure("auroc", "far_ood", "textures", "mcm")) in analysis.comparisons


@pytest.mark.parametrize("metric", ["aurc", "augrc", "coverage_at_risk"])
def test_metrics_of_the_confidences_order(store, analysis, metric):
    functions = {
        "aurc": aurc,
        "augrc": augrc,
        "coverage_at_risk": lambda c, k: coverage_at_risk(c, k, risk=0.05),
    }
    columns = [
        [torch.tensor(column(store, method, "id", name)["concepts"]) for name in ("confidence", "correct")]
        for method in ("fp32", "minmax")
    ]
    found = analysis.comparisons["vit_clean", W4, Measure(metric, "id")]
    expected = paired_bootstrap(functions[metric], *columns, n_resamples=400, seed=3)
    assert found.value == pytest.approx(float(functions[metric](*columns[1])))
    assert found.change.estimate == pytest.approx(expected.estimate)
    assert found.change.stderr == pytest.approx(expected.stderr, rel=0.25)


def test_classwise_ece_comes_from_the_rows(tmp_path):
    """Samples do not hold all probabilities: value and standard errors are the stored ones."""
    store = write_study(tmp_path, KEYS[:2], size=0.45)  # enough samples per class for a test
    analysis = analyse(StudyResults.load(tmp_path))
    found = analysis.comparisons["vit_clean", W4, Measure("classwise_ece", "id")]
    rows = store.rows().query("model == 'vit_clean' and dataset == '' and role == 'id'").set_index(["method", "metric"])
    assert found.value == rows.loc[("minmax", "classwise_ece"), "value"]
    assert found.reference == rows.loc[("fp32", "classwise_ece"), "value"]
    assert found.stderr == rows.loc[("minmax", "classwise_ece"), "stderr"]
    value, reference = (rows.loc[(m, "classwise_ece_debiased"), "value"] for m in ("minmax", "fp32"))
    stderr = rows.loc[("minmax", "delta_classwise_ece_debiased"), "stderr"]
    assert found.change.estimate == pytest.approx(value - reference) and found.change.stderr == stderr
    assert found.p_value == pytest.approx(2 * norm.sf(abs(value - reference) / stderr))


@pytest.mark.parametrize("settings", [Statistics(n_bins=7, risk=0.2, n_resamples=120, n_resamples_ranking=40, seed=3)])
def test_every_number_is_the_store_s_to_the_last_digit(tmp_path, settings):
    """A run's rows, as a run files them, and the study's comparisons: the same values, errors and changes for every measure."""
    keys = grid(["vit_clean"], ["minmax"], [(8, 8), (4, 8)], ["vision"], tuned=True)
    store = write_study(tmp_path, keys, size=0.1, settings=settings)
    analysis = analyse(StudyResults.load(tmp_path))
    rows = store.rows()
    names = ["method", "is_tuned", "weight_bits", "role", "dataset", "score", "metric"]
    found = rows.set_index(names)[["value", "stderr"]]
    assert analysis.statistics == settings
    compared = set()
    for (_, setting, measure), c in analysis.comparisons.items():
        key = (setting.method, setting.is_tuned, setting.weight_bits, measure.role, measure.dataset, measure.score)
        if not (setting == FULL and measure.info.needs_reference):
            assert tuple(found.loc[(*key, measure.metric)]) == (c.value, c.stderr), measure
        if c.effect is not None and not measure.info.needs_reference and measure.tested_by == measure:
            value, stderr = found.loc[(*key, f"delta_{measure.metric}")]
            assert value == c.effect.estimate, measure
            if measure.info.is_tested:
                assert c.effect.stderr == pytest.approx(stderr, rel=1e-12), measure  # centring may cost a last bit
        compared.add(measure.metric)
    assert compared >= {name for name in METRICS if METRICS[name].is_shown}


def test_tuned_runs_are_compared_with_full_precision_as_it_came(tmp_path):
    store = write_study(tmp_path, grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], tuned=True), size=0.2)
    analysis = analyse(StudyResults.load(tmp_path))
    assert analysis.settings == [W4] and StudyResults.load(tmp_path).superseded == 0
    measures = {measure for _, setting, measure in analysis.comparisons if setting == W4.tuned}
    assert not {m.metric for m in measures} & {"top1", "top5", "agreement", "rsg", "vuln_add"}
    assert {m.score for m in measures} == {"", "energy"}  # a scale leaves mcm as it is
    confidence, correct = (
        torch.tensor(column(store, "minmax.lst", "id", name)["concepts"]) for name in ("confidence", "correct")
    )
    found = analysis.comparisons["vit_clean", W4.tuned, Measure("ece", "id")]
    assert found.value == pytest.approx(float(calibration_error(confidence, correct)), abs=1e-6)
    full = analysis.comparisons["vit_clean", FULL, Measure("ece", "id")]
    assert found.reference == full.value
    assert analysis.changes(Measure("ece", "id")) == [analysis.comparisons["vit_clean", W4, Measure("ece", "id")]]
    assert len(analysis.changes(Measure("ece", "id"), is_tuned=True)) == 2  # full precision's own too


def test_trajectories_of_seeds_are_pooled(tmp_path):
    keys = [key for seed in (0, 1) for key in grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], seed, tuned=True)]
    write_study(tmp_path, keys, size=0.1)
    both = analyse(StudyResults.load(tmp_path)).trajectories["vit_clean", W4]
    assert both.confidence.shape[0] == 3 and float(both.count.sum()) == 2 * 160
    kept = both.count > 0
    weights = both.count[kept] / both.count.sum()
    accuracy = column(ResultsStore(tmp_path), "fp32", "id", "correct")["concepts"].mean()  # the same for both seeds
    assert float((both.accuracy[0, kept] * weights).sum()) == pytest.approx(accuracy)
