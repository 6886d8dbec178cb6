"""Verdicts on a store in which one control is the quantization itself and another one does nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from cases.mechanism import VLMS, write_mechanism

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import Interval
from lightning_vlmq.study.analysis import runs
from lightning_vlmq.study.analysis.columns import Comparisons
from lightning_vlmq.study.analysis.comparison import analyse
from lightning_vlmq.study.analysis.mechanism import (
    ALL_VLMS,
    control_name,
    pattern_of,
    unjudged,
    verdict_frame,
    verdicts,
    whole_of,
)
from lightning_vlmq.study.analysis.prediction import prediction_table
from lightning_vlmq.study.analysis.runs import StudyResults
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.mechanism import verdict_overview, verdict_summary
from lightning_vlmq.study.report.mechanism import prediction_html, summary_table, tally, verdict_table
from lightning_vlmq.study.report.spectral import mechanism_section


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    root = tmp_path_factory.mktemp("mechanism")
    write_mechanism(root)
    return analyse(StudyResults.load(root))


def test_settings_know_what_they_imitate():
    control = Setting(
        "matched_noise", 4, 8, "vision", "weight_granularity=per_tensor, pattern=gptq, seed=3, draw=each_forward"
    )
    assert pattern_of(control) == Setting("gptq", 4, 8, "vision", "weight_granularity=per_tensor")
    assert control_name(control) == "matched_noise(draw=each_forward)"
    assert pattern_of(Setting("rank_truncation", 4, 8, "vision")) == Setting("minmax", 4, 8, "vision")
    assert pattern_of(Setting("gptq", 4, 8, "vision")) is None
    operated = Setting("gptq", 4, 8, "vision", "act_granularity=per_token, surgery=heal 0-8")
    assert pattern_of(operated) == Setting("gptq", 4, 8, "vision", "act_granularity=per_token")
    assert control_name(operated) == "heal 0-8" and not operated.is_quantization
    assert whole_of(operated) == Setting("gptq", 4, 8, "vision", "act_granularity=per_token, surgery=whole")
    assert whole_of(replace(operated, variant="surgery=coherent")).variant == "surgery=whole"
    assert (
        pattern_of(Setting("spectral_shrink", 4, 8, "vision", "surgery=heal 0-8")) is None
    )  # a control's error is nobody's


def test_the_same_reproduces_and_nothing_does_not(analysis):
    found = verdicts(analysis)
    assert {v.vlm for v in found} == {*VLMS, ALL_VLMS}
    told = 0
    for v in found:
        assert v.quantized.method == "minmax" and v.n_vlms == (3 if v.vlm == ALL_VLMS else 1)
        if v.found.verdict == "nothing to reproduce":
            continue
        told += 1
        assert v.is_surgery == (v.control in ("heal 64+", "hurt 64+"))
        if v.control in ("matched_noise", "heal 64+"):
            assert v.n_seeds == (1 if v.is_surgery else 5)
            assert v.found.ratio == pytest.approx(1) and v.found.verdict == "reproduces"
        else:
            assert abs(v.found.ratio) < 1e-9 and v.found.verdict == "does not"
    assert told >= 4
    frame = verdict_frame(found)
    assert len(frame) == len(found) and set(frame["verdict"]) <= {
        "reproduces",
        "does not",
        "undecided",
        "nothing to reproduce",
        "no match",
    }
    assert frame["sqnr_gap_db"].isna().all()  # none stored


def test_a_surgery_is_compared_with_the_image_features_whole_error(analysis):
    """Not with the quantized model, whose text tower has an error of its own; without the whole there is nothing to compare with."""
    nothing = {(vlm, s.surgery, m): c for (vlm, s, m), c in analysis.comparisons.items() if s.surgery == "hurt 64+"}
    swapped, lacking = {}, {}
    for (vlm, setting, measure), comparison in analysis.comparisons.items():
        is_whole = setting.surgery == "whole"
        swapped[vlm, setting, measure] = nothing[vlm, "hurt 64+", measure] if is_whole else comparison
        if not is_whole:
            lacking[vlm, setting, measure] = comparison
    found = verdicts(replace(analysis, comparisons=Comparisons.gathered(swapped)))
    assert {v.found.verdict for v in found if v.is_surgery} == {"nothing to reproduce"}
    assert "reproduces" in {v.found.verdict for v in found if not v.is_surgery}  # controls go on as before
    assert not any(v.is_surgery for v in verdicts(replace(analysis, comparisons=Comparisons.gathered(lacking))))


def test_controls_and_surgeries_are_no_quantizations(analysis):
    """They do not count among a study's changes, nor as methods whose gains go together."""
    changes = analysis.changes(Measure("top1", "id"))
    assert len(changes) == len(VLMS) * 3
    assert {setting.method for _, setting in analysis.joint_gains()} == {"minmax", "gptq", "mse"}
    assert not any(setting.surgery for setting in analysis.settings)
    assert {setting.method for setting in analysis.settings} >= {"matched_noise", "spectral_shrink"}


def test_the_summary_counts_settings(analysis):
    found = verdicts(analysis)
    pooled = [v for v in found if v.vlm == ALL_VLMS]
    counts = tally(found)
    assert {control for _, control in counts} == {"matched_noise", "spectral_shrink", "heal 64+", "hurt 64+"}
    assert all(sum(own.values()) == 1 for own in counts.values())  # one quantized setting
    changed = {v.dimension.title for v in pooled if v.found.verdict != "nothing to reproduce"}
    assert changed and all(counts[title, "heal 64+"]["reproduces"] for title in changed)
    assert all(counts[title, "hurt 64+"]["does not"] for title in changed)
    html = summary_table(found)
    assert html.count("<tr>") == 1 + len({v.dimension.title for v in found}) and "●&nbsp;1" in html
    assert html.index("spectral_shrink") < html.index("heal 64+")  # controls first
    assert summary_table([]) == "" and verdict_summary([]) is None
    figure = verdict_summary(found)
    bars = {axis.get_title("left"): [p.get_width() for p in axis.patches] for axis in figure.axes}
    assert set(bars) == {"matched_noise", "spectral_shrink", "heal 64+", "hurt 64+"}
    assert sum(bars["heal 64+"]) == len(changed)  # a whole bar each


def test_fewer_seeds_are_undecided(analysis):
    comparisons = {
        key: c
        for key, c in analysis.comparisons.items()
        if not (key[1].method == "matched_noise" and "seed=0" not in key[1].variant)
    }
    found = verdicts(replace(analysis, comparisons=Comparisons.gathered(comparisons)))
    noise = {v.found.verdict for v in found if v.control == "matched_noise"}
    assert noise <= {"undecided", "nothing to reproduce"} and "undecided" in noise


def test_seeds_of_the_study_are_no_draws_of_noise(analysis):
    """Five runs of one control have its noise five times."""
    once = {
        key: replace(c, n_seeds=5)
        for key, c in analysis.comparisons.items()
        if not (key[1].method == "matched_noise" and "seed=0" not in key[1].variant)
    }
    found = [
        v
        for v in verdicts(replace(analysis, comparisons=Comparisons.gathered(once)))
        if v.control == "matched_noise" and v.found.verdict != "nothing to reproduce"
    ]
    assert found and all((v.n_seeds, v.found.verdict) == (1, "undecided") for v in found)


def test_what_no_resample_shows_widens_the_ratio(analysis):
    """No resample of a control that does nothing differs; its error is that of a share that no image changes."""
    measure, control = Measure("top1", "id"), Setting("spectral_shrink", 4, 8, "vision")
    for factor in (1, 2):
        doubted = {
            key: replace(c, effect=Interval.normal(c.effect.estimate, factor * c.effect.stderr)) if c.effect else c
            for key, c in analysis.comparisons.items()
        }
        found = verdicts(replace(analysis, comparisons=Comparisons.gathered(doubted)))
        (v,) = (v for v in found if (v.vlm, v.control, v.dimension.measure) == (VLMS[0], control.method, measure))
        stderr = factor * analysis.comparisons[VLMS[0], control, measure].effect.stderr
        assert stderr > 0 and np.ptp(analysis.comparisons[VLMS[0], control, measure].effects) == 0
        assert (v.found.high - v.found.low) / 2 == pytest.approx(1.645 * stderr / abs(v.change), rel=0.25)


def with_sqnr(analysis, sqnr):
    """The study with output SQNR filed for every run, of a function of VLM and setting."""
    results = analysis.results
    first = results.rows.astype(object).drop_duplicates("run_id").set_index("run_id", drop=False)
    runs_ = [run for run in results.runs if not run.key.is_full_precision]
    value = [sqnr(results.vlm_of(run), run.setting) for run in runs_]
    own = first.loc[[run.run_id for run in runs_]].assign(metric="output_sqnr_db", value=value)
    return replace(
        analysis, results=replace(results, rows=pd.concat([results.rows.astype(object), own], ignore_index=True))
    )


def test_a_control_that_is_no_match_claims_nothing(analysis):
    def sqnr(vlm, setting):
        if setting.method == "spectral_shrink" or setting.surgery:
            return 40.0  # not made to be as strong
        return (
            18.6 - 2.9 * (setting.method == "matched_noise") - 15.4 * (vlm == VLMS[0] and "seed=3" in setting.variant)
        )

    found = verdicts(with_sqnr(analysis, sqnr))
    before = {(v.vlm, v.control, v.quantized, v.dimension): v for v in verdicts(analysis)}
    judged = 0
    for v in found:
        old = before[v.vlm, v.control, v.quantized, v.dimension]
        if v.control != "matched_noise":
            assert v.found == old.found and v.gap_db == pytest.approx(21.4)
        elif v.vlm == VLMS[0]:
            assert v.gap_db == pytest.approx(-18.3)
            if old.found.verdict != "nothing to reproduce":
                assert v.found.verdict == "no match" and np.isnan([v.found.low, v.found.high]).all()
        else:
            assert v.gap_db == pytest.approx(-2.9) and v.found.verdict in (old.found.verdict, "nothing to reproduce")
            assert v.n_vlms == (2 if v.vlm == ALL_VLMS else 1)
            judged += v.found.verdict == "reproduces"
    assert judged
    alone = [v for v in found if v.vlm == VLMS[0]]
    assert "× no match" in verdict_table(alone) and "more than 3 dB" in summary_table(alone)
    assert sum(own["no match"] for own in tally(alone).values()) == sum(v.found.verdict == "no match" for v in alone)
    assert verdict_overview(alone) is not None and verdict_summary(alone) is not None


def test_of_all_vlms_those_with_enough_seeds_count(analysis):
    lacking = {
        key: c
        for key, c in analysis.comparisons.items()
        if not (key[0] == VLMS[0] and key[1].method == "matched_noise" and "seed=4" in key[1].variant)
    }
    found = verdicts(replace(analysis, comparisons=Comparisons.gathered(lacking)))
    whole = [v for v in verdicts(analysis) if v.control == "matched_noise" and v.vlm in VLMS[1:]]
    for v in (v for v in found if v.control == "matched_noise" and v.vlm == ALL_VLMS):
        assert (v.n_vlms, v.n_seeds) == (2, 5) and v.found.verdict in ("reproduces", "nothing to reproduce")
        assert v.change == pytest.approx(np.mean([o.change for o in whole if o.dimension == v.dimension]))
    assert all(v.n_vlms == 3 for v in found if v.vlm == ALL_VLMS and v.control != "matched_noise")


def test_without_samples_a_line_says_that_nothing_is_judged(analysis, monkeypatch):
    assert unjudged(analysis) == ""
    monkeypatch.setattr(runs, "MANY_OF_ONE_VLM", 3)
    bare = analyse(StudyResults.load(analysis.results.root))
    assert verdicts(bare) == [] and "no verdicts" in unjudged(bare)
    assert mechanism_section(bare).count("No verdicts on controls") == 1
    assert "No verdicts" not in mechanism_section(analysis)
    plain = [run for run in bare.results.runs if run.setting.is_quantization]
    assert unjudged(replace(bare, results=replace(bare.results, runs=tuple(plain)))) == ""


def test_predictions_cover_outcomes_and_baselines(analysis):
    table = prediction_table(analysis, n_resamples=200)
    assert {"ΔECE", "ΔRSG", "Δcorruption"} <= set(table["outcome"])
    assert {"mean_sqnr_db", "gain_0-8", "agreement", "bits"} <= set(table["predictor"])
    pair = table[(table["predictor"] == "gain_0-8") & (table["outcome"] == "ΔECE")]
    same = table[(table["predictor"] == "mean_sqnr_db") & (table["outcome"] == "ΔECE")]
    assert float(pair["rho"].iloc[0]) == pytest.approx(float(same["rho"].iloc[0]))  # one follows from the other
    assert (table["n"].dropna() <= 9).all()  # three methods on three models: controls are no quantization
    assert np.nanmin(table["q_value"]) >= np.nanmin(table["p_value"])
    assert prediction_table(analysis, site="vision/block 99").empty


def test_the_report_shows_both(analysis):
    html = verdict_table(verdicts(analysis))
    assert "reproduces" in html and "does not" in html and "spectral_shrink" in html
    figure = verdict_overview(verdicts(analysis))
    assert figure is not None and len(figure.axes) >= 4
    assert verdict_overview([]) is None and verdict_table([]) == ""
    assert "mean_sqnr_db" in prediction_html(prediction_table(analysis, n_resamples=50))
    assert prediction_html(pd.DataFrame()) == ""
    few = pd.DataFrame({"outcome": ["ΔECE"], "predictor": ["bits"], "rho": [float("nan")], "is_baseline": [True]})
    assert prediction_html(few) == ""
