"""The report's tables on the mechanism: does a control reproduce quantization's change, and what foretells it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pandas as pd

from lightning_vlmq.study.analysis.mechanism import ALL_VLMS, MATCH_DB, Verdict, control_order
from lightning_vlmq.study.report.cells import html_table

MARKS = {"reproduces": "●", "does not": "○", "undecided": "?", "nothing to reproduce": "–", "no match": "×"}
"""How a verdict is marked, in table and figure."""


NO_MATCH = f"no match: its output SQNR is more than {MATCH_DB:.0f} dB from quantization's"


def pooled_verdicts(found: Sequence[Verdict]) -> list[Verdict]:
    """Those over all VLMs; of a study of one VLM, that one's."""
    pooled = [v for v in found if v.vlm == ALL_VLMS]
    return pooled or list(found)


def tally(found: Sequence[Verdict]) -> dict[tuple[str, str], dict[str, int]]:
    """How often each verdict was given, by dimension and control (or surgery), over quantized settings."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for v in pooled_verdicts(found):
        own = counts.setdefault((v.dimension.title, v.control), dict.fromkeys(MARKS, 0))
        own[v.found.verdict] += 1
    return counts


def summary_table(found: Sequence[Verdict]) -> str:
    """One row per dimension, one column per control and surgery: in how many settings it reproduces the change, and in how many not."""
    counts = tally(found)
    if not counts:
        return ""
    columns = sorted({v.control for v in found}, key=control_order)
    dimensions = list(dict.fromkeys(v.dimension.title for v in found))
    body = []
    for dimension in dimensions:
        cells = []
        for column in columns:
            own = counts.get((dimension, column))
            cells.append(
                "" if own is None else " ".join(f"{MARKS[verdict]}&nbsp;{n}" for verdict, n in own.items() if n)
            )
        body.append([escape(dimension), *cells])
    marks = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    note = (
        "<p class='note'>Number of quantized settings by verdict: does the change of the control, or of the model whose error was healed "
        f"or hurt in these ranks, equal quantization's own within half of it? (For a surgery: that of the image features' error alone, "
        f"classes being full precision's.) {marks} ({NO_MATCH}). Were the damping of high ranks the cause, then "
        "<code>rank_truncation</code>, <code>spectral_shrink</code> and <code>hurt</code> of the high ranks would reproduce the change, "
        "and <code>heal</code> of them would not.</p>"
    )
    return note + html_table([["dimension", *map(escape, columns)]], body)


def verdict_table(found: Sequence[Verdict]) -> str:
    """One row per quantized setting and dimension, one column per control: the verdict, and the ratio with its interval."""
    shown = pooled_verdicts(found)
    if not shown:
        return ""
    controls = sorted({v.control for v in shown}, key=control_order)
    rows = list(dict.fromkeys((v.quantized, v.dimension) for v in shown))
    by_cell = {(v.quantized, v.dimension, v.control): v for v in shown}
    body = []
    for setting, dimension in sorted(rows, key=lambda row: row[0].sort_key):
        own = [by_cell.get((setting, dimension, control)) for control in controls]
        change = next(v.change for v in own if v is not None)
        body.append(
            [
                escape(setting.label),
                f"<td class='left'>{escape(dimension.title)}</td>",
                f"{100 * change:+.1f}",
                *map(_cell, own),
            ]
        )
    marks = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    note = (
        "<p class='note'>Change: as in the overview, in percent or points; for surgeries that of the image features' whole error alone, "
        "classes being full precision's. Cells: the control's (or surgery's) change as a share of "
        f"it, with the 90 % interval of two one-sided 5 % tests. {marks}; equivalent means within half of it; {NO_MATCH}.</p>"
    )
    return note + html_table([["setting", "dimension", "change", *map(escape, controls)]], body)


def _cell(v: Verdict | None) -> str:
    if v is None:
        return ""
    ratio = "" if math.isnan(v.found.ratio) else f" {v.found.ratio:.2f}"
    interval = "" if math.isnan(v.found.low) else f" [{v.found.low:.2f}, {v.found.high:.2f}]"
    return f"{MARKS[v.found.verdict]} {v.found.verdict}{ratio}{interval}"


def prediction_html(table: pd.DataFrame, most: int = 6) -> str:
    """The strongest predictors of each outcome, and the plain baselines beside them; nothing of too few runs to correlate."""
    table = table[table["rho"].notna()] if not table.empty else table
    if table.empty:
        return ""
    head = ["outcome", "predictor", "Spearman ρ", "95 % interval", "one VLM left out", "q"]
    body = []
    for outcome, part in table.groupby("outcome", sort=False):
        kept = pd.concat([part[~part["is_baseline"]].head(most), part[part["is_baseline"]]])
        for row in kept.itertuples():
            name = f"<i>{escape(row.predictor)}</i>" if row.is_baseline else escape(row.predictor)
            cells = [
                escape(str(outcome)),
                f"<td class='left'>{name}</td>",
                f"{row.rho:.2f}",
                f"{row.low:.2f} to {row.high:.2f}",
                f"{row.left_out_low:.2f} to {row.left_out_high:.2f}",
                f"{row.q_value:.3f}",
            ]
            body.append(cells)
    note = (
        "<p class='note'>Correlation inside a VLM at one bit-width (bits: inside a VLM), averaged over VLMs; intervals from "
        "a bootstrap over VLMs, q from an exact sign-flip test over them, corrected over the table. In italics: plain baselines.</p>"
    )
    return note + html_table([head], body)
