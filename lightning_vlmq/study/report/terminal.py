"""What the terminal shows when a study has ended: the main numbers of every run, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_vlmq.evaluation.headline import DEBIASED
from lightning_vlmq.evaluation.measures import Measure, dimensions
from lightning_vlmq.study.analysis.change import FULL, Comparison, tested_gain
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.report.notation import signed

MOST_LINES = 200
"""With more VLMs and settings the terminal shows none of them: the report has them, sorted and searched."""


def summary_table(analysis: StudyAnalysis) -> Table | str:
    """Per VLM and setting the number that stands for each dimension, in percent, with its change in points; a word where there are many."""
    if (lines := analysis.comparisons.cells([FULL, *analysis.settings])) > MOST_LINES:
        return f"{lines:,} models compared: too many for a terminal, see the report"
    measured = {measure for _, _, measure in analysis.comparisons}
    shown = [dimension for dimension in dimensions(analysis.score) if dimension.measure in measured]
    title = "percent (change in points; * significant at 5 % FDR)"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    if any(dimension.measure.tested_by != dimension.measure for dimension in shown):
        table.caption = DEBIASED
    table.add_column("", no_wrap=True)
    for dimension in shown:
        table.add_column(dimension.heading, justify="right")
    for vlm in analysis.vlms:
        for setting in [FULL, *analysis.settings]:
            found = [analysis.comparisons.get((vlm, setting, dimension.measure)) for dimension in shown]
            if any(found):
                name = f"[bold]{escape(vlm)}[/] fp32" if setting == FULL else f"  {escape(setting.label)}"
                table.add_row(name, *(_cell(d.measure, c) for d, c in zip(shown, found)))
        table.add_section()
    return table


def _cell(measure: Measure, comparison: Comparison | None) -> str:
    if comparison is None or np.isnan(comparison.value):
        return "–"
    value = f"{100 * comparison.value:.1f}"
    if comparison.change is None:
        return value
    change = comparison.change.estimate
    text = signed(100 * change, 1, comparison.is_significant)
    if not comparison.is_significant:
        return f"{value} [dim]({text})[/]"
    colour = "green" if tested_gain(measure, comparison) > 0 else "red"
    return f"{value} [{colour}]({text}*)[/]"


def timing_table(seconds: Mapping[str, list[float]]) -> Table:
    """Seconds by stage: number of runs, total, mean."""
    table = Table(
        title="seconds per stage", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("stage")
    for name in ("runs", "total", "mean"):
        table.add_column(name, justify="right")
    for stage, taken in seconds.items():
        table.add_row(stage, str(len(taken)), f"{sum(taken):.1f}", f"{np.mean(taken):.1f}")
    return table
