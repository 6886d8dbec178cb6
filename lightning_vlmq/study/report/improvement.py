"""The report's tables of what gets better: shares of improved runs, what training and tuning were worth."""

from __future__ import annotations

from html import escape

import numpy as np
import torch

from lightning_vlmq.core.names import bits_text
from lightning_vlmq.evaluation.measures import Measure, dimensions
from lightning_vlmq.statistics import share_improved
from lightning_vlmq.study.analysis.change import FULL, Comparison, tested_gain
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.analysis.training import WORTH_HEAD, WORTH_NOTE, worth_by_setting, worth_cells
from lightning_vlmq.study.report.cells import comparison_cell, html_table

ECE = Measure("ece", "id")
TUNED_MEASURES = (ECE, Measure("adaptive_ece", "id"), Measure("nll", "id"), Measure("brier", "id"))


def improvement_table(analysis: StudyAnalysis) -> str:
    """Share of (VLM, setting) pairs better than full precision, by dimension and bit-widths."""
    shown = [(escape(d.title), d.measure, False) for d in dimensions(analysis.score)]
    shown.insert(2, ("Calibration, logit scale tuned", ECE, True))
    widths = {s.bits: {"weight_bits": s.weight_bits, "act_bits": s.act_bits} for s in analysis.settings}
    columns: dict[str, dict[str, int]] = ({"all": {}} if len(widths) > 1 else {}) | widths
    body = []
    for title, measure, is_tuned in shown:
        if analysis.changes(measure, is_tuned=is_tuned):
            found = [_share(measure, analysis.changes(measure, None, is_tuned, **where)) for where in columns.values()]
            body.append([f"{title} <small>{escape(measure.info.title)}</small>", *found])
    return html_table([["", *columns]], body) if body else ""


def _share(measure: Measure, comparisons: list[Comparison]) -> str:
    """Share with its Wilson interval above the numbers of significant changes."""
    gains = torch.tensor([gain(measure, c) for c in comparisons], dtype=torch.float64)
    share = share_improved(torch.zeros_like(gains), gains, better="higher")
    if share.n_compared == 0:
        return "–"
    significant = [tested_gain(measure, c) > 0 for c in comparisons if c.is_significant]
    better = sum(significant)
    text = f"{100 * share.share:.0f} % <i>[{100 * share.low:.0f}, {100 * share.high:.0f}]</i>"
    counts = (
        f"{share.n_improved} of {share.n_compared}; significantly {better} better, {len(significant) - better} worse"
    )
    return f"{text}<br><i>{counts}</i>"


def gain(measure: Measure, comparison: Comparison) -> float:
    """By how much a setting's value is better than full precision's."""
    return measure.info.gain(comparison.reference, comparison.value)


def joint_table(analysis: StudyAnalysis) -> str:
    """How gains go together: shares of (VLM, setting) pairs by the signs of the changes of ECE and AUROC, and with gains in all three.

    AUROC is the mean of near- and far-OOD's. Pairs that lack a number are left out.
    """
    gains = list(analysis.joint_gains().values())
    if not gains:
        return ""
    signs = [(g["ece"] > 0, g["auroc"] > 0) for g in gains]
    lines = {
        "calibration better, OOD detection better": [s == (True, True) for s in signs],
        "calibration better, OOD detection not": [s == (True, False) for s in signs],
        "calibration not, OOD detection better": [s == (False, True) for s in signs],
        "neither better": [s == (False, False) for s in signs],
        "accuracy, calibration and OOD detection all better": [all(v > 0 for v in g.values()) for g in gains],
    }
    body = []
    for title, which in lines.items():
        hits = torch.tensor(which, dtype=torch.float64)
        share = share_improved(torch.zeros_like(hits), hits, better="higher")
        text = f"{100 * share.share:.0f} % <i>[{100 * share.low:.0f}, {100 * share.high:.0f}]</i>"
        body.append([title, text, f"{share.n_improved} of {share.n_compared}"])
    return html_table([["change of ECE and of AUROC (mean of near and far)", "share", "(VLM, setting) pairs"]], body)


def training_table(analysis: StudyAnalysis) -> str:
    """What training was worth, by bits and scope, with what the columns are; empty where nothing was trained."""
    found = worth_by_setting(analysis.results)
    body = [[f"{bits_text(w, a)} {escape(scope)}", *worth_cells(worth)] for (w, a, scope), worth in found.items()]
    if not body:
        return ""
    return f"<p class='note'>{escape(WORTH_NOTE)}</p>{html_table([['setting', *map(escape, WORTH_HEAD)]], body)}"


def tuning_table(analysis: StudyAnalysis, vlm: str) -> str:
    """Calibration of one VLM with the logit scale it came with and with the tuned one, both against full precision as it came.

    Empty where nothing of the VLM was tuned.
    """
    scales = _scales(analysis, vlm)
    rows = [s for s in (FULL, *analysis.settings) if (vlm, s.tuned, ECE) in analysis.comparisons]
    if not rows:
        return ""
    top = ["<th></th>", "<th colspan='2' class='group'>logit scale</th>"]
    top += [
        f"<th colspan='2' class='group'>{escape(m.info.title)}{'' if m.metric == 'nll' else ', %'}</th>"
        for m in TUNED_MEASURES
    ]
    head = ["setting", *["as it came", "tuned"] * (1 + len(TUNED_MEASURES))]
    body = []
    for setting in rows:
        stages = (setting, setting.tuned)
        cells = [f"{scales[stage]:.2f}" if stage in scales else "–" for stage in stages]
        for measure in TUNED_MEASURES:
            cells += [comparison_cell(measure, analysis.comparisons.get((vlm, stage, measure))) for stage in stages]
        body.append(["full precision" if setting == FULL else escape(setting.label), *cells])
    return html_table([top, head], body)


def _scales(analysis: StudyAnalysis, vlm: str) -> dict[Setting, float]:
    """Logit scales by setting, means over seeds."""
    rows = analysis.results.about("logit_scale")
    stored = dict(zip(rows["run_id"], rows["value"]))
    found: dict[Setting, list[float]] = {}
    for run in (run for runs in analysis.results.runs_of(vlm) for run in runs if run.run_id in stored):
        found.setdefault(run.setting, []).append(float(stored[run.run_id]))
    return {setting: float(np.mean(values)) for setting, values in found.items()}
