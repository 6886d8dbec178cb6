"""Comparisons against full precision: points, intervals and tests against scipy, scikit-learn and the metrics package."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from cases.study import grid, make_run, write_study
from scipy.stats import false_discovery_control, norm
from sklearn.metrics import roc_auc_score

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.estimates import calibration_gaps
from lightning_vlmq.evaluation.measures import N_RESAMPLES, Measure
from lightning_vlmq.metrics.functional import aurc, calibration_error, coverage_at_risk
from lightning_vlmq.results.schema import RunKey
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import bootstrap_replicates, delong, paired_bootstrap
from lightning_vlmq.study.analysis.comparison import FULL, StudyAnalysis, analyse, average_effect
from lightning_vlmq.study.analysis.runs import Setting, StudyResults, align

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
    full, quantized = (column(store, method, "id", "prediction")["garments"] for method in ("fp32", "minmax"))
    assert found.value == pytest.approx((full == quantized).mean())
    assert found.change is None and np.isnan(found.p_value)
    assert analysis.comparisons["vit_clean", FULL, Measure("agreement", "id")].value == 1


def test_ece_has_the_metric_s_value_and_exactly_its_bootstrap(store, analysis):
    found = analysis.comparisons["vit_clean", W4, Measure("ece", "id")]
    columns = {
        m: [torch.tensor(column(store, m, "id", n)["garments"]) for n in ("confidence", "correct")]
        for m in ("fp32", "minmax")
    }
    assert found.value == pytest.approx(float(calibration_error(*columns["minmax"])), abs=1e-6)
    expected = paired_bootstrap(calibration_error, columns["fp32"], columns["minmax"], n_resamples=N_RESAMPLES, seed=0)
    assert found.change.estimate == pytest.approx(expected.estimate, abs=1e-6)
    assert found.change.high - found.change.low == pytest.approx(expected.high - expected.low, abs=1e-6)
    assert found.change.stderr == pytest.approx(expected.stderr, abs=1e-6)
    assert found.change.low < found.change.estimate < found.change.high


def test_calibration_gaps_add_up_on_degenerate_confidences():
    confidence = np.array([[0.0], [1.0], [1 / 3], [np.float32(2 / 15)], [0.999]])
    correct = np.array([[1.0], [0.0], [1.0], [1.0], [0.0]])
    for n in range(1, 6):
        ece = np.abs(calibration_gaps(confidence[:n], correct[:n]).mean(0)).sum(-1)
        arguments = torch.tensor(confidence[:n, 0], dtype=torch.float32), torch.tensor(correct[:n, 0])
        assert ece[0] == pytest.approx(float(calibration_error(*arguments)), abs=1e-6)
    assert np.isnan(calibration_gaps(np.array([[np.nan]]), np.array([[np.nan]]))).all()


def test_adaptive_ece_value(store, analysis):
    confidence, correct = (
        torch.tensor(column(store, "minmax", "id", n)["garments"]) for n in ("confidence", "correct")
    )
    found = analysis.comparisons["vit_clean", W4, Measure("adaptive_ece", "id")]
    assert found.value == pytest.approx(float(calibration_error(confidence, correct, binning="mass")), abs=1e-6)
    spread = bootstrap_replicates(
        lambda a, b: calibration_error(a, b, binning="mass"), confidence, correct, n_resamples=300, seed=9
    )
    assert found.stderr == pytest.approx(float(spread.std()), rel=0.25)


@pytest.mark.parametrize("score", ["mcm", "energy"])
def test_auroc_of_a_data_set_is_delong_s(store, analysis, score):
    scores = {
        method: [column(store, method, "id", score)["garments"], column(store, method, "far_ood", score)["digits"]]
        for method in ("fp32", "minmax")
    }
    found = analysis.comparisons["vit_clean", W4, Measure("auroc", "far_ood", "digits", score)]
    is_id = np.repeat([1, 0], [len(side) for side in scores["minmax"]])
    assert found.value == pytest.approx(roc_auc_score(is_id, np.concatenate(scores["minmax"])))
    expected = delong(*(torch.tensor(side) for side in scores["fp32"] + scores["minmax"]))
    assert found.change.estimate == pytest.approx(expected.difference)
    assert found.p_value == pytest.approx(expected.p_value)
    assert found.change.low == pytest.approx(expected.low) and found.change.high == pytest.approx(expected.high)


def test_auroc_of_a_role_is_the_mean_and_its_bootstrap_agrees_with_delong(analysis):
    role = analysis.comparisons["vit_clean", W4, Measure("auroc", "far_ood", "", "mcm")]
    sets = [
        analysis.comparisons["vit_clean", W4, Measure("auroc", "far_ood", name, "mcm")]
        for name in ("digits", "textures")
    ]
    assert role.value == pytest.approx(np.mean([c.value for c in sets]))
    near = analysis.comparisons["vit_clean", W4, Measure("auroc", "near_ood", "", "mcm")]
    alone = analysis.comparisons["vit_clean", W4, Measure("auroc", "near_ood", "held_out", "mcm")]
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
    table = analysis.table()
    tested = table[table["p_value"].notna()]
    assert analysis.n_tests == len(tested) > 40
    np.testing.assert_allclose(tested["q_value"], false_discovery_control(tested["p_value"]))
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
    rows = rows[rows["metric"] != "classwise_ece"]  # whose change a run itself has to say
    store = ResultsStore(tmp_path)
    store.write("full", rows, samples, curves)
    same = {"run_id": "same", "method": "minmax", "scope": "vision", "weight_bits": 8, "act_bits": 8}
    store.write("same", rows.assign(**same), samples, curves)
    analysis = analyse(StudyResults.load(tmp_path))
    changes = [c for c in analysis.comparisons.values() if c.change is not None]
    assert changes and all(c.change.estimate == 0 and c.p_value == 1 and c.q_value == 1 for c in changes)


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


def test_a_seed_without_full_precision_takes_another_seed_s(tmp_path):
    keys = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"])
    quantized_again = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], seed=1)[1]
    write_study(tmp_path, [*keys, quantized_again], size=0.05)
    assert analyse(StudyResults.load(tmp_path)).comparisons["vit_clean", W4, Measure("top1", "id")].n_seeds == 2


def test_vlms_without_full_precision_are_named_not_compared(tmp_path):
    write_study(tmp_path, [key for key in KEYS if key.method != "fp32" or key.model == "vit_clean"], size=0.05)
    analysis = analyse(StudyResults.load(tmp_path))
    assert analysis.unreferenced == ["convnext_noisy"] and analysis.vlms == ["vit_clean"]
    assert {vlm for vlm, _, _ in analysis.comparisons} == {"vit_clean"}


def test_other_samples_than_full_precision_s_are_refused(tmp_path):
    store = ResultsStore(tmp_path)
    for key in KEYS[:2]:
        rows, samples, curves = make_run(key, key.method, size=0.05)
        store.write(key.method, rows, samples[samples["index"] > 0] if key.method == "minmax" else samples, curves)
    with pytest.raises(VLMQError, match="run 'minmax' has other samples of"):
        analyse(StudyResults.load(tmp_path))


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


def test_the_newest_run_of_a_key_counts(tmp_path):
    store = ResultsStore(tmp_path)
    for run_id, size in (("z-old", 0.05), ("a-new", 0.1)):
        for key in KEYS[:2]:
            store.write(f"{run_id}-{key.method}", *make_run(key, f"{run_id}-{key.method}", size))
    results = StudyResults.load(tmp_path)
    assert [run.run_id for run in results.runs] == ["a-new-fp32", "a-new-minmax"] and results.superseded == 2
    assert set(results.rows["run_id"]) == {"a-new-fp32", "a-new-minmax"}


def test_samples_come_sorted_and_split_by_data_set(store):
    run = StudyResults.load(store.root).runs[0]
    expected = store.samples(run.run_id)
    sets = run.samples()
    assert sum(len(columns["index"]) for columns in sets.values()) == len(expected)
    for where, columns in sets.items():
        mine = expected[(expected["dataset"] == where.dataset) & (expected["role"] == where.role)].sort_values("index")
        for name in ("index", "prediction", "energy"):
            np.testing.assert_array_equal(columns[name], mine[name])


def test_unsorted_samples_are_aligned(tmp_path):
    store = ResultsStore(tmp_path)
    for key in KEYS[:2]:
        rows, samples, curves = make_run(key, key.method, size=0.05)
        store.write(key.method, rows, samples.sample(frac=1, random_state=len(key.method)), curves)
    shuffled = analyse(StudyResults.load(tmp_path))
    ordered = analyse(StudyResults.load(write_study(tmp_path / "ordered", KEYS[:2], size=0.05).root))
    keys = ["method", "role", "dataset", "score", "metric"]
    tables = (analysis.table().sort_values(keys, ignore_index=True) for analysis in (shuffled, ordered))
    pd.testing.assert_frame_equal(*tables)


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(VLMQError, match=r"no results in .*run the study first"):
        StudyResults.load(tmp_path / "nothing")


def test_align_keeps_runs_without_samples_undefined(tmp_path):
    store = ResultsStore(tmp_path)
    rows, samples, curves = make_run(KEYS[0], "full", size=0.05)
    store.write("full", rows, samples, curves)
    rows, _, curves = make_run(KEYS[1], "bare", size=0.05)
    store.write("bare", rows, pd.DataFrame(), curves)
    matrix = align(list(StudyResults.load(tmp_path).runs))["id"][0]
    assert np.isnan(matrix["correct"][:, 1]).all() and not np.isnan(matrix["correct"][:, 0]).any()


@pytest.mark.parametrize("metric", ["mce", "aurc", "coverage_at_risk_5", "adaptive_ece"])
def test_metrics_of_the_confidences_order(store, analysis, metric):
    functions = {
        "mce": lambda c, k: calibration_error(c, k, norm="max"),
        "aurc": aurc,
        "coverage_at_risk_5": lambda c, k: coverage_at_risk(c, k, risk=0.05),
        "adaptive_ece": lambda c, k: calibration_error(c, k, binning="mass"),
    }
    columns = [
        [torch.tensor(column(store, method, "id", name)["garments"]) for name in ("confidence", "correct")]
        for method in ("fp32", "minmax")
    ]
    found = analysis.comparisons["vit_clean", W4, Measure(metric, "id")]
    expected = paired_bootstrap(functions[metric], *columns, n_resamples=400, seed=3)
    assert found.value == pytest.approx(float(functions[metric](*columns[1])))
    assert found.change.estimate == pytest.approx(expected.estimate)
    assert found.change.stderr == pytest.approx(expected.stderr, rel=0.25)


def test_classwise_ece_comes_from_the_rows(store, analysis):
    """Samples do not hold all probabilities: value and standard errors are the stored ones."""
    found = analysis.comparisons["vit_clean", W4, Measure("classwise_ece", "id")]
    rows = (
        store.rows().query("model == 'vit_clean' and metric.str.contains('classwise')").set_index(["method", "metric"])
    )
    value, reference = rows.loc[("minmax", "classwise_ece"), "value"], rows.loc[("fp32", "classwise_ece"), "value"]
    assert (found.value, found.reference) == (pytest.approx(value), pytest.approx(reference))
    assert found.stderr == pytest.approx(0.004)
    assert found.change.stderr == pytest.approx(0.02 * reference)  # that of the relative change, in points
    assert found.p_value == pytest.approx(2 * norm.sf(abs(value - reference) / (0.02 * reference)))


def test_tuned_runs_are_compared_with_full_precision_as_it_came(tmp_path):
    store = write_study(tmp_path, grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"], tuned=True), size=0.2)
    analysis = analyse(StudyResults.load(tmp_path))
    assert analysis.settings == [W4] and StudyResults.load(tmp_path).superseded == 0
    measures = {measure for _, setting, measure in analysis.comparisons if setting == W4.tuned}
    assert not {m.metric for m in measures} & {"top1", "top5", "agreement", "rsg", "vuln_add"}
    assert {m.score for m in measures} == {"", "energy"}  # a scale leaves mcm as it is
    confidence, correct = (
        torch.tensor(column(store, "minmax.lst", "id", name)["garments"]) for name in ("confidence", "correct")
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
    accuracy = column(ResultsStore(tmp_path), "fp32", "id", "correct")["garments"].mean()  # the same for both seeds
    assert float((both.accuracy[0, kept] * weights).sum()) == pytest.approx(accuracy)
