"""Comparisons from rows alone are those from samples; a store without samples reports."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from cases.study import grid, write_study

from lightning_vlmq.evaluation.measures import Measure, dimensions
from lightning_vlmq.study.analysis import runs as module
from lightning_vlmq.study.analysis.change import FULL, average_effect
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.groups import group_effects
from lightning_vlmq.study.analysis.published import held_against
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.stored import change_error
from lightning_vlmq.study.report.page import write_report

KEYS = grid(["vit_clean", "convnext_noisy"], ["minmax"], [(8, 8), (4, 8)], ["vision_text"], tuned=True)


def from_rows(monkeypatch):
    for limit in ("MANY_RUNS", "MANY_OF_ONE_VLM"):
        monkeypatch.setattr(module, limit, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_study(root, KEYS, size=0.2)
    return root


def test_rows_say_what_samples_say(root, monkeypatch):
    samples = analyse(StudyResults.load(root))
    from_rows(monkeypatch)
    rows = analyse(StudyResults.load(root))
    assert not rows.results.takes_samples and samples.results.takes_samples
    # full precision beside itself has no row: no flips, no vulnerability
    wanted = {k: c for k, c in samples.comparisons.items() if k[1] != FULL or not k[2].info.needs_reference}
    assert set(wanted) <= set(rows.comparisons) and len(wanted) > 300
    assert len(rows.results.rows) < len(samples.results.rows)
    assert rows.results.evaluations == samples.results.evaluations
    tested = 0
    for key, one in wanted.items():
        other = rows.comparisons[key]
        assert (other.value, other.stderr) == pytest.approx((one.value, one.stderr), rel=1e-6, nan_ok=True), key
        assert (other.change is None) == (one.change is None), key
        if one.change is None:
            continue
        for a, b in ((one.change, other.change), (one.effect, other.effect)):
            assert b.estimate == pytest.approx(a.estimate, rel=1e-6, abs=1e-12, nan_ok=True), key
            # of relative measures the change's own error follows to first order only, which is rougher where ranks jump
            rough = 0.6 if key[2].metric.startswith(("fpr95", "aupr", "coverage")) else 0.1
            assert b.stderr == pytest.approx(a.stderr, rel=rough if key[2].info.is_relative else 1e-6, nan_ok=True), key
        tested += not np.isnan(one.p_value)
    assert tested > 200


def test_what_counts_is_the_number_of_one_vlms_runs(root, monkeypatch):
    """Its samples are what is in memory at once; replicates outlive it only of what is averaged or judged over VLMs."""
    whole = analyse(StudyResults.load(root))
    largest = max(sum(key.model == vlm for key in KEYS) for vlm in whole.vlms)
    monkeypatch.setattr(module, "MANY_RUNS", 1)
    monkeypatch.setattr(module, "MANY_OF_ONE_VLM", largest)
    many = analyse(StudyResults.load(root))
    assert len(many.results.runs) > largest and many.results.takes_samples
    assert len(many.results.rows) < len(whole.results.rows)  # rows that nothing needs are left out all the same
    pd.testing.assert_frame_equal(many.comparisons.table(), whole.comparisons.table())
    kept = {key[2] for key, c in whole.comparisons.items() if len(c.effects)}
    assert {d.measure for d in dimensions(whole.score)} <= kept and len(kept) == 9
    monkeypatch.setattr(module, "MANY_OF_ONE_VLM", largest - 1)
    assert not StudyResults.load(root).takes_samples


def test_means_over_vlms_are_never_surer_without_resamples(root, monkeypatch):
    measure, setting = Measure("top1", "id"), {"weight_bits": 4}
    whole = average_effect(analyse(StudyResults.load(root)).changes(measure, **setting))
    from_rows(monkeypatch)
    found = analyse(StudyResults.load(root)).changes(measure, **setting)
    bare = average_effect(found)
    assert len(found) == 2 and bare.estimate == pytest.approx(whole.estimate)
    assert (
        bare.stderr == pytest.approx(np.mean([c.effect.stderr for c in found])) and bare.stderr >= 0.99 * whole.stderr
    )


def test_groups_and_claims_from_rows_are_wider_by_what_is_not_known(root, monkeypatch):
    """Never surer than from samples, and mostly less than twice as unsure here; by pandas the spread over VLMs and the mean error."""

    def found():
        analysis = analyse(StudyResults.load(root))
        groups = {(e.grouping, e.group, e.dimension.title): e.found for e in group_effects(analysis)}
        return groups, {claim.claim: claim.found for claim in held_against(analysis)}, analysis.comparisons.table()

    groups, claims, _ = found()
    from_rows(monkeypatch)
    bare_groups, bare_claims, table = found()
    assert set(bare_groups) == set(groups) and len(groups) > 15
    ratios = []
    for key, whole in groups.items():
        assert bare_groups[key].estimate == pytest.approx(whole.estimate)
        ratios.append(bare_groups[key].stderr / whole.stderr)
    assert min(ratios) > 0.95 and np.median(ratios) < 2 and max(ratios) < 5
    own = table[
        (table["metric"] == "ece") & (table["role"] == "id") & (table["method"] == "minmax") & ~table["is_tuned"]
    ]
    means = own.groupby("vlm")[["effect", "effect_stderr"]].mean()
    expected = np.hypot(means["effect"].sem(), means["effect_stderr"].mean())
    assert bare_groups["", "all", "Calibration"].stderr == pytest.approx(expected)
    one = next(name for name in claims if name.startswith("largest growth"))
    assert bare_claims[one].stderr == pytest.approx(claims[one].stderr, rel=0.1)


def test_a_store_packed_without_samples_reports(tmp_path):
    store = write_study(tmp_path, KEYS[:3], size=0.05)
    n = store.compact(keeps_samples=False)
    assert n == 3
    analysis = analyse(StudyResults.load(tmp_path))
    page = write_report(analysis).read_text()
    assert "Made from the rows of 3 runs alone" in page and "evaluation runs" in page
    assert "vit_clean" in page and (tmp_path / "comparisons.csv").stat().st_size > 1000


def test_runs_on_other_samples_are_not_compared_and_said_to_be(tmp_path, monkeypatch):
    """As with samples at hand, which are refused: a full precision of more images is nothing to hold a run against."""
    full, quantized = grid(["vit_clean"], ["minmax"], [(4, 8)], ["vision_text"])
    write_study(tmp_path, [quantized], size=0.2)
    write_study(tmp_path, [full], size=0.4)
    from_rows(monkeypatch)
    monkeypatch.setattr(module, "MANY_OF_ONE_VLM", 1)
    analysis = analyse(StudyResults.load(tmp_path))
    assert not analysis.results.takes_samples
    changed = [m for (_, _, m), c in analysis.comparisons.items() if c.change is not None]
    assert all(m.info.needs_reference for m in changed)  # those a run measures against a full precision of its own
    (note,) = analysis.results.notes
    assert "1 runs saw other samples than full precision" in note and "Run them again" in note
    assert note.replace("'", "&#x27;") in write_report(analysis).read_text(encoding="utf-8")


def test_the_error_of_a_change_from_that_of_its_ratio():
    """Against draws: two correlated means, their difference and their relative change."""
    rng = np.random.default_rng(0)
    for correlation, value in ((0.9, 0.4), (0.0, 0.6), (-0.5, 0.9), (0.99, 0.75)):
        cov = np.array([[0.0004, correlation * 0.0003], [correlation * 0.0003, 0.000225]])
        q, f = rng.multivariate_normal([value, 0.7], cov, 200_000).T
        found = change_error(value, q.std(), 0.7, f.std(), (1 - q / f).std())
        assert found == pytest.approx((q - f).std(), rel=0.03)
    assert change_error(0.0, 0.1, 0.5, 0.1, 0.2) == 0.1 and np.isnan(change_error(0.5, 0.1, 0.5, 0.1, np.nan))
