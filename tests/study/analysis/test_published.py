"""The published claims on a made study: the numbers by pandas, the verdicts by where an interval lies."""

import math

import numpy as np
import pytest
from cases.study import grid, write_study
from scipy import stats

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import ClusteredMean
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.published import NEGLIGIBLE, Claim, Query, held_against
from lightning_vlmq.study.analysis.runs import StudyResults

METHODS = ["minmax", "lsq_contrastive", "matched_noise"]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    keys = grid(methods=METHODS, bits=[(8, 8), (4, 8)], scopes=["vision_text"])
    return analyse(StudyResults.load(write_study(tmp_path_factory.mktemp("study"), keys, size=0.06).root))


@pytest.fixture(scope="module")
def claims(analysis):
    return {claim.claim: claim for claim in held_against(analysis)}


@pytest.fixture(scope="module")
def table(analysis):
    """Every comparison of a quantization; the control is none."""
    table = analysis.comparisons.table()
    return table[~table["method"].isin(["fp32", "matched_noise"]) & (table["dataset"] == "")]


def means_by_vlm(table, values):
    return values.groupby(table["vlm"]).mean().to_numpy()


def test_a_mean_over_vlms_is_that_of_the_table(claims, table):
    own = table.query("metric == 'top1' and role == 'corruption'")
    points = means_by_vlm(own, own["value"] / own["full_precision"] - 1)
    found = claims["accuracy under synthetic corruption"]
    assert found.found.estimate == pytest.approx(points.mean()) and found.n_cells == len(own)
    assert found.found.n_clusters == len(points) > 1 and "top1 on corruption" in found.query
    assert found.found.stderr >= stats.sem(points) * (1 - 1e-9)  # the common images come on top
    own = stats.sem(points)
    half = np.hypot(stats.t.ppf(0.975, len(points) - 1) * own, 1.96 * np.sqrt(max(found.found.stderr**2 - own**2, 0)))
    assert (found.found.low, found.found.high) == pytest.approx((points.mean() - half, points.mean() + half), rel=1e-4)


def test_changes_in_points(claims, table):
    own = table.query("metric == 'rsg' and method == 'minmax' and weight_bits == 4")
    assert claims["ΔRSG, simple PTQ, W4A8"].found.estimate == pytest.approx(means_by_vlm(own, own["change"]).mean())
    own = table.query("metric == 'vuln_add' and method == 'minmax' and weight_bits == 4")
    assert claims["added vulnerability, simple PTQ, W4A8"].found.estimate == pytest.approx(
        means_by_vlm(own, own["value"]).mean()
    )
    assert not any("Rot+LSQ" in name for name in claims)  # nothing stored to hold against it


def test_shares(claims, table):
    own = table.query("metric == 'ece' and role == 'id' and weight_bits == 8 and not is_tuned")
    better = means_by_vlm(own, (own["value"] < own["full_precision"]).astype(float))
    share = claims["share of W8A8 models whose calibration improves"].found
    assert share.estimate == pytest.approx(better.mean()) and 0 <= share.low <= share.high <= 1
    wide = table.pivot_table(
        index=["vlm", "method", "weight_bits"], columns=["metric", "role"], values=["value", "full_precision"]
    )
    change = wide["value"] - wide["full_precision"]
    auroc = (change["auroc", "near_ood"] + change["auroc", "far_ood"]) / 2
    trained = auroc.index.get_level_values("method") == "lsq_contrastive"
    all_three = (change["top1", "id"] > 0) & (change["ece", "id"] < 0) & (auroc > 0)
    name = "share of trained models that gain in accuracy, calibration and OOD detection at once"
    assert claims[name].found.estimate == pytest.approx(all_three[trained].groupby("vlm").mean().mean())
    name = "share of models whose AUROC rises while their ECE worsens"
    both = (auroc > 0) & (change["ece", "id"] > 0)
    assert claims[name].found.estimate == pytest.approx(both.groupby("vlm").mean().mean())


def test_contrasts_are_welch_s_interval(tmp_path):
    """Two VLMs of each source: scipy's own test of the two groups' means."""
    vlms = [f"{family}_{source}" for source in ("noisy", "clean") for family in ("vit", "convnext", "coca")]
    keys = grid(vlms=vlms, methods=["minmax"], bits=[(4, 8)], scopes=["vision"])
    analysis = analyse(StudyResults.load(write_study(tmp_path, keys, size=0.03).root))
    found = {claim.claim: claim for claim in held_against(analysis)}
    name = "growth of ECE, VLMs from noisy captions (LAION) minus those from clean ones (WIT, DFN)"
    cells = Query(Measure("ece", "id")).cells(analysis)
    groups = [[cells[vlm][0].point for vlm in cells if source in vlm] for source in ("noisy", "clean")]
    expected = stats.ttest_ind(*groups, equal_var=False).confidence_interval(0.95)
    assert (found[name].found.low, found[name].found.high) == pytest.approx((expected.low, expected.high))


def test_one_vlm_of_a_kind_decides_nothing(claims):
    contrast = claims["growth of AUROC (near and far OOD), ConvNeXt minus ViT"]
    assert math.isnan(contrast.found.low) and contrast.verdict == "undecided" and np.isfinite(contrast.found.estimate)


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
        ("some", 0.1, 0.3, "agrees"),
        ("some", 0.0, 0.3, "undecided"),
        ("some", 0.0, 0.0, "disagrees"),
        (0.4, 0.3, 0.5, "agrees"),
        (0.4, 0.0, 0.9, "undecided"),
        (0.4, 0.5, 0.6, "disagrees"),
        ("rises", math.nan, math.nan, "undecided"),
    ],
)
def test_the_verdict_follows_from_the_interval(expects, low, high, verdict):
    found = ClusteredMean((low + high) / 2, 0.0, low, high, 5)
    assert Claim("", "", expects, found, "%", 5, "").verdict == verdict
