"""The report's tables over the grid: effects by group, models that no other beats, seeds beside samples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.groups import GroupEffect
from lightning_vlmq.study.analysis.tradeoffs import pareto_front, seed_spread
from lightning_vlmq.study.report.cells import html_table
from lightning_vlmq.study.report.notation import percent_interval


def pareto_table(analysis: StudyAnalysis) -> str:
    """Each VLM's models on the front of accuracy, calibration, OOD detection and size; empty where a number lacks."""
    body = []
    for vlm, front in pareto_front(analysis).items():
        for c in front:
            label = "full precision" if c.setting == FULL else escape(c.setting.label)
            cells = [f"{100 * value:.1f}" for value in (c.top1, c.ece, c.auroc)]
            body.append([escape(vlm), f"<td class='left'>{label}</td>", *cells, f"{c.bits:.1f}"])
    head = ["VLM", "<th class='left'>setting</th>", "top-1, %", "ECE, %", "AUROC, %", "bits a weight"]
    return html_table([head], body) if body else ""


def seed_table(analysis: StudyAnalysis) -> str:
    """Spread over seeds beside the standard error over test images; empty with one seed."""
    body = [
        [
            f"{escape(s.dimension.title)} <small>{escape(s.dimension.measure.info.title)}</small>",
            f"<td class='left'>{s.kind}</td>",
            f"{100 * s.over_seeds:.2f}",
            f"{100 * s.over_samples:.2f}",
            f"{s.n_seeds:,} of {s.n_pairs:,}",
        ]
        for s in seed_spread(analysis)
    ]
    head = [
        "",
        "<th class='left'>methods</th>",
        "over seeds, points",
        "over images, points",
        "runs of (VLM, setting) pairs",
    ]
    return html_table([head], body) if body else ""


def group_table(found: Sequence[GroupEffect]) -> str:
    """Mean effects of groups of settings: one row per group, one column per dimension."""
    shown = list(dict.fromkeys(effect.dimension for effect in found))
    by_cell = {(e.grouping, e.group, e.dimension): e for e in found}
    body = []
    for grouping, group in dict.fromkeys((e.grouping, e.group) for e in found):
        own = [by_cell.get((grouping, group, dimension)) for dimension in shown]
        pairs = max(e.n_cells for e in own if e is not None)
        vlms = max(e.found.n_clusters for e in own if e is not None)
        label = f"{escape(group)} <small>{escape(grouping)}</small>" if grouping else f"<b>{escape(group)}</b>"
        cells = [
            "–" if e is None else "{} <i>{}</i>".format(*percent_interval(e.found.estimate, e.found.low, e.found.high))
            for e in own
        ]
        body.append([label, *cells, f"{pairs:,} of {vlms:,}"])
    titles = (f"{escape(d.title)}<br><small>{escape(d.effect)}</small>" for d in shown)
    return html_table([["settings", *titles, "pairs of VLMs"]], body) if body else ""
