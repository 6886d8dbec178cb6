"""The published claims on a made study: the numbers by pandas, the verdicts by where an interval lies."""

import math

import numpy as np
import pandas as pd
import pytest
from cases.study import QUICK, grid, make_run
from scipy import stats

from lightning_vlmq.results.schema import ROW_SCHEMA
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.statistics import ClusteredMean, Interval
from lightning_vlmq.study.analysis import runs as runs_module
from lightning_vlmq.study.analysis.claims import ABOUT, ALMOST_ALL, NEGLIGIBLE, Claim
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.groups import Cell
from lightning_vlmq.study.analysis.published import held_against
from lightning_vlmq.study.analysis.queries import METHODS, joint_share, mean_share
from lightning_vlmq.study.analysis.runs import SHIFT_SETS, StudyResults
from lightning_vlmq.study.analysis.setting import Setting

VLMS = ["vit_clean", "convnext_noisy", "vit_noisy", "convnext_clean"]
OUTSIDE = [("spectral_mixed", 8, 8), ("minmax", 4, 4), ("matched_noise", 4, 8)]
BANDS = ("0-8", "8-64", "64+")


def recorded_rows(run_id, is_full):
    """What callbacks would have recorded, at random: sites of two blocks and the output, weights, and shifted sets."""
    rng = np.random.default_rng(list(run_id.encode()))
    names = [f"sqnr_db_{band}" for band in BANDS] + ["mean_sqnr_db", "low_frequency_share", "low_frequency_share_full"]
    names += [f"top1_keep_{name}" for band in BANDS for name in (f"own_zero_{band}", f"full_zero_{band}_full")]
    sites = ("vision/block 0", "vision/block 1", "vision/block 2", "vision/output")
    rows = [] if is_full else [("concepts", "id", site, name, rng.random()) for site in sites for name in names]
    rows += [("concepts", "id", f"{tower}/attention", "stable_rank", 5 + rng.random()) for tower in ("vision", "text")]
    rows += [(name, "shift", "", "top1", rng.random()) for name in SHIFT_SETS]
    frame = pd.DataFrame(rows, columns=["dataset", "role", "score", "metric", "value"])
    return frame.assign(corruption="", severity=0, stderr=0.0, n=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = ResultsStore(tmp_path_factory.mktemp("study"))
    keys = grid(VLMS, ["minmax", "lsq_contrastive"], [(8, 8), (4, 8)], ["vision_text"])
    keys += grid(VLMS[:2], ["minmax"], [(8, 8)], ["vision_text"], tuned=True)
    for method, *bits in OUTSIDE:
        keys += grid(VLMS[:1], [method], [tuple(bits)], ["vision_text"])
    keys += grid(["vit_clean+outliers50"], ["minmax"], [(4, 8)], ["vision_text"])
    for key in dict.fromkeys(keys):
        run_id = f"{key.model.replace('+', '_')}-{key.method}{'.lst' if key.is_tuned else ''}-{key.bits}"
        rows, samples, curves = make_run(key, run_id, 0.04)
        own = (
            [] if key.is_tuned else [recorded_rows(run_id, key.is_full_precision).assign(**rows.iloc[0][KEY].to_dict())]
        )
        store.write(run_id, pd.concat([rows, *own], ignore_index=True), samples, curves, statistics=QUICK)
    return store


KEY = ["model", "pretrained", "scope", "method", "weight_bits", "act_bits", "variant", "is_tuned", "seed"]
KEY += ["code_version", "run_id"]


@pytest.fixture(scope="module")
def analysis(store):
    return analyse(StudyResults.load(store.root))


@pytest.fixture(scope="module")
def claims(analysis):
    return {claim.claim: claim for claim in held_against(analysis)}


def of_grid(table):
    """Lines of the published grid; planted outliers, other methods and other bits are outside."""
    is_inside = table["method"].isin(["minmax", "lsq_contrastive"]) & (table["act_bits"] == 8)
    return table[is_inside & table["vlm"].isin(VLMS) & (table["dataset"] == "")]


@pytest.fixture(scope="module")
def table(analysis):
    return of_grid(analysis.comparisons.table())


def points_by_vlm(table, values):
    return values.groupby(table["vlm"]).mean()


def starting(claims, *starts):
    """The claims whose titles begin so, in this order."""
    return [next(claim for title, claim in claims.items() if title.startswith(start)) for start in starts]


def test_the_grid_is_the_published_one():
    assert len(METHODS) == 16 and {"minmax", "lsqplus_feature", "rot_lsq_contrastive"} < METHODS


def test_a_mean_over_vlms_is_that_of_the_table(claims, table):
    own = table.query("metric == 'top1' and role == 'corruption'")
    points = points_by_vlm(own, own["value"] / own["full_precision"] - 1).to_numpy()
    found = claims["accuracy under synthetic corruption"]
    assert found.found.estimate == pytest.approx(points.mean()) and found.n_cells == len(own) == 16
    assert found.found.n_clusters == len(points) == 4 and found.query == (
        "growth of top1 on corruption; 16 methods, W8A8 to W4A8"
    )
    assert found.found.stderr >= stats.sem(points) * (1 - 1e-9)  # the common images come on top
    own = stats.sem(points)
    half = np.hypot(stats.t.ppf(0.975, len(points) - 1) * own, 1.96 * np.sqrt(max(found.found.stderr**2 - own**2, 0)))
    assert (found.found.low, found.found.high) == pytest.approx((points.mean() - half, points.mean() + half), rel=1e-4)


def test_changes_in_points(claims, table):
    own = table.query("metric == 'rsg' and method == 'minmax' and weight_bits == 4")
    assert claims["ΔRSG, simple PTQ, W4A8"].found.estimate == pytest.approx(points_by_vlm(own, own["change"]).mean())
    own = table.query("metric == 'vuln_add' and method == 'minmax' and weight_bits == 4")
    found = claims["added vulnerability, simple PTQ, W4A8"].found
    assert found.estimate == pytest.approx(points_by_vlm(own, own["value"]).mean())
    own = table.query("metric == 'signed_calibration_error' and role == 'id' and not is_tuned")
    found = claims["confidence minus accuracy"]
    assert found.found.estimate == pytest.approx(points_by_vlm(own, own["change"]).mean()) and found.n_cells == len(own)
    assert not any("Rot+LSQ" in name for name in claims)  # nothing stored to hold against it


def test_calibration_errors_stand_beside_their_growth(claims, table):
    own = table.query("metric == 'ece' and role == 'id' and is_tuned")
    for title, column in (("– ECE of these models", "value"), ("– ECE of their full precision", "full_precision")):
        claim = claims[title]
        assert claim.found.estimate == pytest.approx(points_by_vlm(own, own[column]).mean())
        assert claim.verdict == "no claim" and claim.n_cells == len(own)


def test_shares(claims, table):
    own = table.query("metric == 'ece' and role == 'id' and weight_bits == 8 and not is_tuned")
    better = points_by_vlm(own, (own["value"] < own["full_precision"]).astype(float))
    share = claims["share of W8A8 models whose calibration improves"].found
    assert share.estimate == pytest.approx(better.mean()) and 0 <= share.low <= share.high <= 1


def test_joint_changes(claims, table):
    plain = table[~table["is_tuned"]]
    wide = plain.pivot_table(
        index=["vlm", "method", "weight_bits"],
        columns=["metric", "role"],
        values=["value", "full_precision", "q_value"],
    )
    change = wide["value"] - wide["full_precision"]
    auroc = change["auroc", "near_ood"] + change["auroc", "far_ood"]
    signs = {"better": lambda gain: gain > 0, "not better": lambda gain: ~(gain > 0)}
    total = 0.0
    for ece, ece_holds in signs.items():
        for ood, ood_holds in signs.items():
            both = ece_holds(-change["ece", "id"]) & ood_holds(auroc)
            claim = claims[f"– ECE {ece}, AUROC {ood}"]
            assert claim.found.estimate == pytest.approx(both.groupby("vlm").mean().mean())
            total += claim.found.estimate
    assert total == pytest.approx(1) and claim.n_cells == 16
    all_three, worse = starting(claims, "share of trained models that gain", "share of models whose AUROC rises")
    assert (all_three.n_cells, worse.n_cells) == (8, 16) and all_three.expects == worse.expects == "some"


def gains_of(*pairs):
    """Models of four VLMs with gains of a given size in standard errors."""
    cells = [(f"vlm {k % 4}", Setting("minmax", 8, 8, "vision", str(k))) for k in range(len(pairs))]
    return {cell: {n: Interval.normal(x, 1.0) for n, x in zip("ab", pair)} for cell, pair in zip(cells, pairs)}


def test_chance_is_no_gain_and_certain_ones_count():
    both = {"a": 1, "b": 1}
    rng = np.random.default_rng(0)
    found = joint_share(gains_of(*rng.normal(size=(400, 2))), both)  # a quarter have both signs
    assert found.estimate == 0 and Claim("", "", "some", found, "%", 400, "").verdict == "undecided"
    found = joint_share(gains_of(*[(9, 9)] * 40), both)
    assert (found.estimate, found.low, found.high) == (1, 1, 1)
    assert Claim("", "", "some", found, "%", 40, "").verdict == "agrees"
    found = joint_share(gains_of(*[(9, -9)] * 40), both)
    assert found.high == 0 and Claim("", "", "some", found, "%", 40, "").verdict == "disagrees"
    assert joint_share(gains_of(*[(9, -9)] * 40), {"a": 1, "b": -1}).low == 1
    found = joint_share(gains_of(*[(9, 9), (9, 1), (-9, 9), (9, -1)] * 10), both)
    assert (found.estimate, found.high) == (0.25, 1)


@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("k", [2, 5, 10])
def test_the_interval_of_a_share_holds_where_all_are_alike(truth, k):
    """VLMs of which a part has the property in every setting; ones alone must not be taken for certainty."""
    drawn = np.random.default_rng(k).random((4000, k)) < truth
    alike = [row for row in drawn if row.all()]
    found = mean_share({f"vlm {n}": [Cell(1.0)] * 3 for n in range(k)})
    assert found.low == pytest.approx(stats.beta.ppf(0.025, k, 1)) and found.high == 1
    assert len(alike) / len(drawn) <= 0.035 or found.low <= truth
    none = mean_share({f"vlm {n}": [Cell(0.0)] for n in range(k)})
    assert (none.low, none.high) == (0, pytest.approx(1 - found.low))
    some = mean_share({"vlm 1": [Cell(1.0)], "vlm 2": [Cell(0.5)]})
    assert some.low < 0.75 < some.high <= 1
    assert math.isnan(mean_share({"vlm": [Cell(1.0)]}).low)


def test_groups_of_vlms_stand_by_themselves_and_against_each_other(claims, table, analysis):
    own = table.query("metric == 'ece' and role == 'id' and not is_tuned")
    growth = points_by_vlm(own, own["change"] / own["full_precision"])
    is_noisy = growth.index.str.endswith("noisy")
    noisy, clean, minus = starting(
        claims,
        "growth of ECE: VLMs from noisy captions, LAION",
        "growth of ECE: those from clean",
        "growth of ECE: VLMs",
    )
    minus = next(c for title, c in claims.items() if title.startswith("growth of ECE") and "minus" in title)
    assert noisy.found.estimate == pytest.approx(growth[is_noisy].mean()) and noisy.expects == "rises"
    assert clean.found.estimate == pytest.approx(growth[~is_noisy].mean()) and clean.expects == "falls"
    expected = stats.ttest_ind(growth[is_noisy], growth[~is_noisy], equal_var=False).confidence_interval(0.95)
    assert (minus.found.low, minus.found.high) == pytest.approx((expected.low, expected.high))
    full = analysis.comparisons.table().query(
        "metric == 'signed_calibration_error' and role == 'id' and method == 'fp32'"
    )
    sign = full[full["dataset"] == ""].query("not is_tuned").set_index("vlm")["value"]
    change = points_by_vlm(own, own["change"])
    named = {1: "change of ECE: VLMs overconfident in full precision", -1: "change of ECE: underconfident ones"}
    for way, title in named.items():
        expected = change[[vlm for vlm in change.index if way * sign[vlm] > 0]]
        assert (title in claims) == bool(len(expected))
        if len(expected):
            assert claims[title].found.estimate == pytest.approx(expected.mean())


def test_the_largest_growth_allows_for_being_the_largest(claims, table):
    own = table.query("metric == 'ece' and role == 'id' and not is_tuned")
    growth, error = own["change"] / own["full_precision"], own["change_stderr"] / own["full_precision"]
    (found,) = starting(claims, "largest growth of ECE")
    z = stats.norm.ppf(1 - 0.05 / 2 / len(own))
    assert found.found.estimate == pytest.approx(growth.max()) and own.loc[growth.idxmax(), "vlm"] in found.claim
    expected = (growth - z * error).max(), (growth + z * error).max()
    assert (found.found.low, found.found.high) == pytest.approx(expected) and found.n_cells == len(own)


def test_architectures(claims, table):
    own = table.query("metric == 'top1' and role == 'corruption'")
    growth = points_by_vlm(own, own["value"] / own["full_precision"] - 1)
    families = growth.groupby(growth.index.str.split("_").str[0]).mean()
    (found,) = starting(claims, "share of architectures (convnext, vit)")
    assert found.found.estimate == pytest.approx((families > 0).mean()) and found.expects == "almost all"
    assert found.found.low <= found.found.estimate <= found.found.high


def wide_rows(store):
    """Rows of runs as they are stored, by VLM; a column per metric."""
    rows = (
        store.table(store.run_ids(), ROW_SCHEMA.names)
        .to_pandas()
        .astype({"role": str, "dataset": str, "metric": str, "score": str})
    )
    rows = rows[~rows["is_tuned"] & rows["model"].isin(VLMS) & rows["role"].isin(["id", "shift"])]
    rows = (
        rows[rows["dataset"] != ""].astype({"model": str, "method": str, "scope": str}).rename(columns={"model": "vlm"})
    )
    wide = rows.pivot_table(
        index=["vlm", "method", "weight_bits", "act_bits", "score", "dataset"], columns="metric", values="value"
    ).reset_index()
    return wide[wide["method"].isin(["fp32", "minmax", "lsq_contrastive"]) & (wide["act_bits"] != 4)]


def vlm_mean(rows, values):
    """Mean over lines of each model, over models of each VLM, over VLMs."""
    by = ["vlm", "method", "weight_bits"]
    return values.groupby([rows[name] for name in by]).mean().groupby("vlm").mean().mean()


def check_recorded(claims, store):
    wide = wide_rows(store)
    quantized = wide[wide["method"] != "fp32"]
    output, blocks = (
        quantized[quantized["score"] == "vision/output"],
        quantized[quantized["score"].str.contains("block")],
    )
    falls = (output["sqnr_db_8-64"] < output["sqnr_db_0-8"]) & (output["sqnr_db_64+"] < output["sqnr_db_8-64"])
    expected = {"share of models whose SQNR": vlm_mean(output, falls.astype(float))}
    trained = output[output["method"] == "lsq_contrastive"]
    for band, title in (("0-8", "0–8"), ("64+", "64+")):
        gain = trained[f"top1_keep_own_zero_{band}"] - trained[f"top1_keep_full_zero_{band}_full"]
        expected[f"accuracy of trained models inside ranks {title}"] = vlm_mean(trained, gain)
    trained = blocks[blocks["method"] == "lsq_contrastive"]
    low = trained["low_frequency_share"] - trained["low_frequency_share_full"]
    expected["share of low spatial frequencies"] = vlm_mean(trained, low)
    int8 = blocks[(blocks["method"] == "minmax") & (blocks["weight_bits"] == 8)]
    noise, is_last = 10 ** (-int8["mean_sqnr_db"] / 10), int8["score"].str.endswith("2")
    early, last = vlm_mean(int8[~is_last], noise[~is_last]), vlm_mean(int8[is_last], noise[is_last])
    expected |= {"– in the first half": early, "– in the last block": last, "noise over signal": last - early}
    both = quantized.merge(wide[wide["method"] == "fp32"], on=["vlm", "score", "dataset"], suffixes=("", "_f"))
    ranks = both.dropna(subset=["stable_rank"])
    expected["stable rank"] = vlm_mean(ranks, ranks["stable_rank"] / ranks["stable_rank_f"] - 1)
    shifted = both[both["dataset"].isin(SHIFT_SETS)]
    sums = shifted.groupby(["vlm", "method", "weight_bits"])[["top1", "top1_f"]].mean()
    growth = (sums["top1"] / sums["top1_f"] - 1).groupby("vlm").mean().mean()
    expected["accuracy under semantic shift (imagenet_a, imagenet_r, imagenet_sketch)"] = growth
    for start, value in expected.items():
        (claim,) = starting(claims, start)
        assert claim.found.estimate == pytest.approx(value, rel=1e-5), start
        assert claim.found.n_clusters == 4 and "16 methods" in claim.query


def test_what_runs_recorded(claims, store):
    check_recorded(claims, store)


def test_a_large_study_keeps_the_rows_that_claims_need(claims, store, monkeypatch):
    monkeypatch.setattr(runs_module, "MANY_RUNS", 0)
    found = {claim.claim: claim for claim in held_against(analyse(StudyResults.load(store.root)))}
    assert list(found) == list(claims)
    check_recorded(found, store)


def test_shift_is_of_all_sets_where_the_published_ones_lack(claims, tmp_path):
    store = ResultsStore(tmp_path)
    for key in grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision"]):
        store.write(key.method, *make_run(key, key.method, 0.03), statistics=QUICK)
    analysis = analyse(StudyResults.load(tmp_path))
    found = {claim.claim: claim for claim in held_against(analysis)}
    (claim,) = starting(found, "accuracy under semantic shift")
    assert claim.claim.endswith("(all sets of the role: inverted, outline, posterised, rotated)")
    own = of_grid(analysis.comparisons.table()).query("metric == 'top1' and role == 'shift'").iloc[0]
    assert claim.found.estimate == pytest.approx(own["value"] / own["full_precision"] - 1)
    assert not any(title.startswith(("share of low", "noise over", "growth of AUROC")) for title in found)


@pytest.mark.parametrize(
    ("expects", "low", "high", "verdict"),
    [
        ("rises", 0.01, 0.02, "agrees"),
        ("rises", -0.01, 0.02, "undecided"),
        ("rises", -0.02, -0.01, "disagrees"),
        ("falls", -0.02, -0.01, "agrees"),
        ("falls", 0.01, 0.02, "disagrees"),
        ("falls", -0.02, 0.02, "undecided"),
        ("stays", -NEGLIGIBLE / 2, NEGLIGIBLE / 2, "agrees"),
        ("stays", -NEGLIGIBLE / 2, 2 * NEGLIGIBLE, "undecided"),
        ("stays", 0.001, 0.002, "disagrees"),
        ("stays", 0.015, 0.017, "disagrees"),
        ("some", 0.1, 0.3, "agrees"),
        ("some", 0.0, 0.3, "undecided"),
        ("some", 0.0, 0.0, "disagrees"),
        ("almost all", ALMOST_ALL, 1.0, "agrees"),
        ("almost all", 0.5, 1.0, "undecided"),
        ("almost all", 0.0, 0.5, "disagrees"),
        (0.4, 0.41, 0.45, "agrees"),
        (0.4, 0.4 - ABOUT, 0.4 + ABOUT, "agrees"),
        (0.4, 0.0, 0.9, "undecided"),
        (0.4, 0.41, 0.6, "undecided"),
        (0.4, 0.51, 0.6, "disagrees"),
        (None, 0.1, 0.2, "no claim"),
        ("rises", math.nan, math.nan, "undecided"),
    ],
)
def test_the_verdict_follows_from_the_interval(expects, low, high, verdict):
    found = ClusteredMean((low + high) / 2, 0.0, low, high, 5)
    assert Claim("", "", expects, found, "%", 5, "").verdict == verdict
