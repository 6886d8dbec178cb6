"""Effects over the grid are means over VLMs of means over settings."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from cases.study import grid, write_study
from scipy import stats

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import Interval
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.groups import Cell, architecture_of, by_vlm, group_effects, sign_error, source_of
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.report.tradeoffs import group_table

VLMS = ["vit_clean", "convnext_noisy", "siglip_clean"]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_study(root, grid(VLMS, ["minmax", "lsq_contrastive"], [(8, 8), (4, 8)], ["vision"]), size=0.05)
    return analyse(StudyResults.load(root))


def test_means_are_those_of_the_table(analysis):
    table = analysis.comparisons.table()
    own = table[(table["metric"] == "top1") & (table["role"] == "id") & (table["dataset"] == "") & ~table["is_tuned"]]
    own = own[own["method"] != "fp32"]
    found = {(e.grouping, e.group): e for e in group_effects(analysis) if e.dimension.title == "Accuracy"}
    chosen = {
        ("", "all"): own["vlm"].notna(),
        ("methods", "trained"): own["method"] == "lsq_contrastive",
        ("bits", "W4A8"): own["weight_bits"] == 4,
        ("architecture", "vit"): own["vlm"] == "vit_clean",
        ("pre-training", "clean"): own["vlm"].isin(["vit_clean", "siglip_clean"]),
    }
    for key, which in chosen.items():
        points = own[which].groupby("vlm")["effect"].mean().to_numpy()
        assert found[key].found.estimate == pytest.approx(points.mean()), key
        assert found[key].n_cells == which.sum() and found[key].found.n_clusters == len(points)
    everything = found["", "all"].found
    points = own.groupby("vlm")["effect"].mean().to_numpy()
    least = stats.t.ppf(0.975, len(points) - 1) * stats.sem(points)  # the common images come on top
    assert everything.high - everything.estimate >= least * (1 - 1e-9)
    assert ("scope", "vision") not in found  # one scope divides nothing
    html = group_table(group_effects(analysis))
    assert html.count("<tr>") == 1 + len(found) and "W4A8 <small>bits</small>" in html


def test_a_name_says_the_family():
    names = {
        "ViT-B-16-SigLIP2@webli": "siglip",
        "coca_ViT-B-32": "coca",
        "convnext_base_w": "convnext",
        "ViT-B-32": "vit",
    }
    assert {name: architecture_of(name) for name in names} == names
    assert architecture_of("RN50") == ""


TRUTH = 0.3


def drawn_cells(rng, k, between, within, common, hidden=0.0, resamples=300):
    """One cell of each of k VLMs: an effect of its own, an error of its own, one of the common images, and one no resample shows."""
    errors = common * rng.standard_normal() + hidden * rng.standard_normal()
    points = TRUTH + between * rng.standard_normal(k) + within * rng.standard_normal(k) + errors
    drawn = common * rng.standard_normal((resamples, 1)) + within * rng.standard_normal((resamples, k))
    stderrs = np.hypot(drawn.std(axis=0, ddof=1), hidden)
    return {str(n): [Cell(points[n], stderrs[n], points[n] + drawn[:, n])] for n in range(k)}


def without_replicates(cells):
    return {vlm: [Cell(cell.point, cell.stderr) for cell in own] for vlm, own in cells.items()}


@pytest.mark.parametrize(
    ("k", "between", "within", "common", "hidden"),
    [(10, 1.0, 0.2, 0.1, 0.0), (10, 0.2, 0.1, 0.5, 0.0), (5, 0.1, 0.1, 0.2, 0.5), (1, 0.0, 0.3, 0.3, 0.5)],
)
def test_intervals_cover_the_truth_with_replicates_and_without(k, between, within, common, hidden):
    rng, hits = np.random.default_rng([k, 1]), {"samples": 0, "rows": 0}
    repetitions, widths = 500, []
    for _ in range(repetitions):
        cells = drawn_cells(rng, k, between, within, common, hidden)
        found = {"samples": by_vlm(cells), "rows": by_vlm(without_replicates(cells))}
        for name, f in found.items():
            hits[name] += f.low <= TRUTH <= f.high
        assert found["rows"].estimate == found["samples"].estimate
        widths.append(found["rows"].stderr / found["samples"].stderr)
    for name, n in hits.items():
        assert stats.binom.cdf(n, repetitions, 0.95) > 0.001, (name, n)
    assert (
        min(widths) > 0.9 and np.mean(widths) >= 1 - 1e-9
    )  # never surer without replicates, but for the draw of these


def test_the_images_part_is_the_mean_error_without_replicates():
    cells = {"a": [Cell(0.1, 0.03), Cell(0.3, 0.05)], "b": [Cell(0.4, 0.08)]}
    found = by_vlm(cells)
    assert found.stderr == pytest.approx(math.hypot(stats.sem([0.2, 0.4]), (0.04 + 0.08) / 2))
    alone = by_vlm({"a": [Cell(0.1, 0.03)]})
    assert (alone.stderr, alone.low) == pytest.approx((0.03, 0.1 - 1.96 * 0.03), rel=1e-4)
    assert math.isnan(by_vlm({"a": [Cell(0.1)]}).stderr)  # nothing is known of its error
    assert by_vlm({"a": [Cell(0.2)], "b": [Cell(0.4)]}).stderr == pytest.approx(stats.sem([0.2, 0.4]))
    mixed = {"a": [Cell(0.2, 0.03, np.array([0.17, 0.23]))], "b": [Cell(0.4, 0.05)]}
    assert by_vlm(mixed).stderr == pytest.approx(math.hypot(0.1, 0.04))


def test_whether_it_got_better_is_as_sure_as_its_sign():
    rng = np.random.default_rng(3)
    for z in (-2.0, 0.3, 1.0):
        draws = z + rng.standard_normal(200_000) > 0
        assert sign_error(Interval.normal(z * 0.01, 0.01)) == pytest.approx(draws.std(), abs=0.005)
    assert sign_error(Interval.normal(0.1, 0.0)) == 0
    change, drawn = Interval.normal(-0.01, 0.01), rng.normal(-0.01, 0.01, 20_000)
    c = SimpleNamespace(
        reference=0.2, value=0.19, change=change, effect=Interval.normal(0.05, 0.05), effects=-drawn / 0.2
    )
    found = Cell.of(Measure("ece", "id"), c, "better")
    c.effects = np.empty(0)
    bare = Cell.of(Measure("ece", "id"), c, "better")
    assert found.point == bare.point == 1 and found.replicates.mean() == pytest.approx(stats.norm.cdf(1), abs=0.01)
    assert bare.stderr == pytest.approx(found.stderr, abs=0.01) and not len(bare.replicates)


@pytest.mark.parametrize(
    ("vlm", "pretrained", "source"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", "noisy"),
        ("hf-hub:laion/CLIP-ViT-B-32", "", "noisy"),
        ("vit_noisy", "noisy", "noisy"),
        ("ViT-B-32", "openai", "clean"),
        ("ViT-L-14", "dfn2b", "clean"),
        ("ViT-B-16", "metaclip_400m", "clean"),
        ("ViT-B-16", "datacomp_xl_s13b_b90k", ""),
        ("switch_base", "with_text", ""),  # neither is WIT
        ("twitter", "unclean", ""),
    ],
)
def test_a_whole_part_of_a_name_says_the_source(vlm, pretrained, source):
    run = SimpleNamespace(key=SimpleNamespace(pretrained=pretrained))
    assert source_of(SimpleNamespace(results=SimpleNamespace(runs_of=lambda _: ([run], []))), vlm) == source
