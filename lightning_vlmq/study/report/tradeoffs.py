"""The report's tables of models that no other beats, and of seeds beside samples."""

from __future__ import annotations

from html import escape

from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.tradeoffs import pareto_front, seed_spread
from lightning_vlmq.study.report.tables import html_table


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
