"""How the report writes one table, one cell, one comparison: HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import FALSE_DISCOVERY_RATE, Z95
from lightning_vlmq.study.analysis.change import Comparison, tested_gain
from lightning_vlmq.study.report.notation import percent_interval, signed


def html_table(head: Sequence[Sequence[str]], body: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of ready HTML cells. A cell that starts with ``<t`` brings its own tag (``<td …>``, ``<th …>``)."""

    def line(cells: Sequence[str], tag: str) -> str:
        own = (cell if cell.startswith(("<td", "<th")) else f"<{tag}>{cell}</{tag}>" for cell in cells)
        return f"<tr>{''.join(own)}</tr>"

    title = f"<caption>{caption}</caption>" if caption else ""
    rows = "".join(line([f"<th scope='row'>{cells[0]}</th>", *cells[1:]], "td") for cells in body)
    heads = "".join(line(cells, "th") for cells in head)
    return f"<div class='scroll'><table>{title}<thead>{heads}</thead><tbody>{rows}</tbody></table></div>"


def stars(q_value: float) -> str:
    """Significance mark of a corrected p-value."""
    return "***" if q_value < 0.001 else "**" if q_value < 0.01 else "*" if q_value < FALSE_DISCOVERY_RATE else ""


def number(measure: Measure, value: float) -> str:
    """A measure's value as the tables write it: in percent, or as it is."""
    if np.isnan(value):
        return "–"
    digits = ".3f" if value == 0 or abs(value) >= 0.01 else ".2g"  # of a small one, as a divergence is, the first ones
    text = f"{100 * value:.1f}" if measure.info.in_percent else f"{value:{digits}}"
    return text.replace("-", "−")


def signed_number(measure: Measure, value: float, is_significant: bool = False) -> str:
    """A change of a measure as the tables write it, with the digits that show a significant one."""
    return signed(100 * value, 1, is_significant) if measure.info.in_percent else signed(value, 3, is_significant)


def comparison_cell(measure: Measure, comparison: Comparison | None) -> str:
    """Value ± standard error above the change with its mark, coloured where it is significant."""
    if comparison is None:
        return "<td class='none'>–</td>"
    stderr = "" if np.isnan(comparison.stderr) else f" <i>±{number(measure, comparison.stderr)}</i>"
    value = "" if measure.metric == "vuln_add" else f"{number(measure, comparison.value)}{stderr}"
    if comparison.change is None:
        return f"<td>{value or '–'}</td>"
    change = comparison.change
    error = f" ±{number(measure, change.stderr)}" if measure.metric == "vuln_add" else ""
    mark = f"{signed_number(measure, change.estimate, comparison.is_significant)}{error}<sup>{stars(comparison.q_value)}</sup>"
    title = f"change {signed_number(measure, change.estimate)}, not tested"
    if not np.isnan(comparison.p_value):
        title = f"change {signed_number(measure, change.estimate)} ± {number(measure, change.stderr)}, "
        title += f"95 % interval {signed_number(measure, change.low)} to {signed_number(measure, change.high)}, "
        title += f"p = {comparison.p_value:.2g}, corrected {comparison.q_value:.2g}"
        title += "" if measure.tested_by == measure else f" (of {measure.tested_by.info.title})"
    return f"<td{_colour(measure, comparison)} title='{title}'>{value}{'<br>' if value else ''}<span>{mark}</span></td>"


def _colour(measure: Measure, comparison: Comparison) -> str:
    """The attribute that colours a cell whose change is significant."""
    if not comparison.is_significant:
        return ""
    return " class='better'" if tested_gain(measure, comparison) > 0 else " class='worse'"


def heading(measure: Measure, unit: str = " %") -> str:
    """A measure's column heading; its convention when the mouse is on it."""
    text = escape(measure.info.title) + (unit if measure.info.in_percent else "")
    convention = measure.info.convention
    return f"<abbr title='{escape(convention, quote=True)}'>{text}</abbr>" if convention else text


def interval_cell(measure: Measure, comparison: Comparison | None) -> str:
    """Value ± half its 95 % interval above the change likewise, coloured where it is significant."""
    if comparison is None:
        return "<td class='none'>–</td>"
    value = f"{number(measure, comparison.value)} <i>±{number(measure, Z95 * comparison.stderr)}</i>"
    change = comparison.change
    if change is None:
        return f"<td>{value}</td>"
    estimate, interval = percent_interval(change.estimate, change.low, change.high)
    half = percent_interval(0.5 * (change.high - change.low), change.low, change.high)[0].lstrip("+")
    mark = f"{estimate} ±{half}<sup>{stars(comparison.q_value)}</sup>"
    return f"<td{_colour(measure, comparison)} title='{interval}'>{value}<br><span>{mark}</span></td>"
