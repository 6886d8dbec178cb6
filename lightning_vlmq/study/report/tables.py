"""The report's tables as HTML."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
import torch

from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.evaluation.about import CLIPPED_LAYERS
from lightning_vlmq.evaluation.measures import Dimension, Measure, dimensions
from lightning_vlmq.statistics import FALSE_DISCOVERY_RATE, Interval, benjamini_hochberg
from lightning_vlmq.study.analysis.change import FULL, Comparison, average_effect
from lightning_vlmq.study.analysis.claims import Claim
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.cells import comparison_cell, heading, html_table, interval_cell, stars
from lightning_vlmq.study.report.notation import percent_interval


def average_table(analysis: StudyAnalysis) -> str:
    """Effects averaged over VLMs, by setting and dimension, with p-values corrected over the table; a dash for controls."""
    shown = [d for d in dimensions(analysis.score) if analysis.changes(d.measure)]
    means: dict[tuple[Setting, Dimension], Interval] = {}
    for dimension in shown:
        found: dict[Setting, list[Comparison]] = {}
        for _, setting, comparison in analysis.comparisons.of(dimension.measure):
            if setting.is_quantization:
                found.setdefault(setting, []).append(comparison)
        means |= {(setting, dimension): average_effect(own) for setting, own in found.items() if not setting.is_tuned}
    p_values = torch.tensor([mean.p_value for mean in means.values()], dtype=torch.float64)
    q_values = dict(zip(means, benjamini_hochberg(p_values).tolist()))
    body = []
    for setting in (s for s in analysis.settings if s.is_quantization):
        cells = [escape(setting.label)]
        for dimension in shown:
            key = setting, dimension
            if key not in means:
                cells.append("–")
                continue
            estimate, interval = percent_interval(means[key].estimate, means[key].low, means[key].high)
            worse = (means[key].estimate > 0) == dimension.measure.worse_is_positive
            kind = "" if not q_values[key] < FALSE_DISCOVERY_RATE else " class='worse'" if worse else " class='better'"
            cells.append(f"<td{kind}>{estimate}<sup>{stars(q_values[key])}</sup><br><i>{interval}</i></td>")
        body.append(cells)
    head = ["setting", *(f"{escape(d.title)}<br><small>{escape(d.effect)}</small>" for d in shown)]
    return html_table([head], body)


def dimension_table(analysis: StudyAnalysis) -> str:
    """The number that stands for each dimension, of every VLM in every setting, with intervals."""
    shown = [d for d in dimensions(analysis.score) if analysis.changes(d.measure)]
    body = []
    for vlm in analysis.vlms:
        for setting in [FULL, *analysis.settings]:
            found = [analysis.comparisons.get((vlm, setting, d.measure)) for d in shown]
            if any(found):
                label = f"<small>{escape(setting.label)}</small>"
                if setting == FULL:
                    label = f"{escape(vlm)} <small>full precision</small>"
                body.append([label, *(interval_cell(d.measure, c) for d, c in zip(shown, found))])
    titles = (f"{escape(d.title)}<br><small>{escape(d.measure.info.title)}, %</small>" for d in shown)
    return html_table([["VLM and setting", *titles]], body)


def vlm_table(analysis: StudyAnalysis, vlm: str) -> str:
    """Every measure of one VLM: full precision, then each setting beside it."""
    own = {measure for name, _, measure in analysis.comparisons if name == vlm}
    measures = [m for m in analysis.measures if m in own and not m.dataset and m.info.is_shown]
    measures.sort(key=lambda m: list(ROLES).index(m.role))  # stable: display order inside a role
    groups: dict[str, list[Measure]] = {}
    for measure in measures:
        score = f", {measure.score}" if measure.score else ""
        groups.setdefault(
            ROLES[measure.role].heading + (" (mean)" if ROLES[measure.role].is_averaged else "") + score, []
        ).append(measure)
    top = ["<th></th>"] + [f"<th colspan='{len(m)}' class='group'>{escape(t)}</th>" for t, m in groups.items()]
    head = ["setting", *map(heading, measures)]
    body = []
    for setting in [FULL, *analysis.settings]:
        found = [analysis.comparisons.get((vlm, setting, measure)) for measure in measures]
        if any(found):
            label = "full precision" if setting == FULL else escape(setting.label)
            body.append([label, *(comparison_cell(m, c) for m, c in zip(measures, found))])
    return html_table([top, head], body)


def detection_table(analysis: StudyAnalysis) -> str:
    """AUROC of every data set and score."""
    measures = [m for m in analysis.measures if m.metric == "auroc" and m.dataset]
    if not measures:
        return ""
    top = ["<th></th>", "<th></th>"]
    top += [f"<th class='group'>{escape(f'{m.dataset} ({ROLES[m.role].heading})')}</th>" for m in measures]
    head = ["VLM", "<th class='left'>setting</th>", *(f"{escape(m.score)}, %" for m in measures)]
    body = []
    for vlm in analysis.vlms:
        for setting in [FULL, *analysis.settings]:
            found = [analysis.comparisons.get((vlm, setting, measure)) for measure in measures]
            if any(found):
                label = "full precision" if setting == FULL else escape(setting.label)
                cells = [comparison_cell(m, c) for m, c in zip(measures, found)]
                body.append([escape(vlm), f"<td class='left'>{label}</td>", *cells])
    return html_table([top, head], body)


def zero_shot_table(analysis: StudyAnalysis) -> str:
    """Top-1 of the full-precision models on every labelled data set, corruptions averaged over severities."""
    results = analysis.results
    references = {run.run_id: vlm for vlm in analysis.vlms for run in results.runs_of(vlm)[0]}
    rows = results.about("top1")
    rows = rows[rows["run_id"].isin(references) & (rows["dataset"] != "")].copy()
    if rows.empty:
        return ""
    rows["vlm"] = rows["run_id"].map(references)
    is_corrupted = rows["role"] == "corruption"
    rows["set"] = rows["dataset"].where(~is_corrupted, rows["corruption"].str.replace("_", " ").replace("", "none"))
    grouped = rows.groupby(["vlm", "role", "set"], sort=False)[["value", "stderr"]].mean()
    order = rows.drop_duplicates(["role", "set"])[["role", "set"]].itertuples(index=False, name=None)
    columns = sorted(order, key=lambda pair: list(ROLES).index(pair[0]))
    roles = list(dict.fromkeys(role for role, _ in columns))
    top = ["<th></th>"]
    for role in roles:
        span = sum(own == role for own, _ in columns)
        top.append(f"<th colspan='{span}' class='group'>{ROLES[role].heading}</th>")
    body = []
    for vlm in analysis.vlms:
        cells = [escape(vlm)]
        for role, name in columns:
            if (vlm, role, name) not in grouped.index:
                cells.append("–")
                continue
            value, stderr = grouped.loc[(vlm, role, name)]
            cells.append(f"{100 * value:.1f} <i>±{100 * stderr:.1f}</i>")
        body.append(cells)
    return html_table([top, ["VLM", *(escape(name) for _, name in columns)]], body)


def coverage_table(analysis: StudyAnalysis) -> str:
    """Shares of the scope's matrix weights and multiply-accumulates that are quantized, and how many layers clip, by VLM and scope."""
    rows = analysis.results.about("coverage_weights", "coverage_macs", CLIPPED_LAYERS)
    if rows.empty:
        return ""
    names = {run.run_id: analysis.results.vlm_of(run) for run in analysis.results.runs}
    rows = rows.assign(vlm=rows["run_id"].map(names))
    body = []
    for keys, own in rows.groupby(["vlm", "scope", "score"], sort=True):
        vlm, scope, part = map(str, keys)  # type: ignore[call-overload]
        shares = [_range(own.loc[own["metric"] == metric, "value"]) for metric in ("coverage_weights", "coverage_macs")]
        label = f"{escape(scope)} ({escape(part)})" if part else escape(scope)
        clipped = own.loc[own["metric"] == CLIPPED_LAYERS, "value"]
        counts = " – ".join(f"{count:.0f}" for count in sorted({clipped.min(), clipped.max()})) if len(clipped) else "–"
        body.append([escape(vlm), f"<td class='left'>{label}</td>", *shares, counts, str(own["run_id"].nunique())])
    head = [
        "VLM",
        "<th class='left'>scope</th>",
        "matrix weights, %",
        "multiply-accumulates, %",
        "layers that clip",
        "runs",
    ]
    return html_table([head], body)


def _range(values: pd.Series) -> str:
    if values.empty:
        return "–"
    low, high = 100 * values.min(), 100 * values.max()
    return f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} – {high:.1f}"


def spectrum_table(analysis: StudyAnalysis) -> str:
    """Stable rank, effective rank and top energy by layer group, full precision and every setting."""
    titles = {"stable_rank": "stable rank", "effective_rank": "effective rank", "top_energy": "top energy, %"}
    rows = analysis.results.about(*titles)
    if rows.empty:
        return ""
    names = {run.run_id: (analysis.results.vlm_of(run), run.setting) for run in analysis.results.runs}
    values: dict[tuple[str, Setting], dict[tuple[str, str], list[float]]] = {}
    for run_id, group, metric, value in rows[["run_id", "score", "metric", "value"]].itertuples(index=False, name=None):
        values.setdefault(names[run_id], {}).setdefault((group, metric), []).append(value)
    columns = sorted(
        {column for own in values.values() for column in own}, key=lambda c: (c[0], list(titles).index(c[1]))
    )
    groups = list(dict.fromkeys(group for group, _ in columns))
    top = ["<th></th>", "<th></th>"]
    top += [
        f"<th colspan='{sum(g == group for g, _ in columns)}' class='group'>{escape(group)}</th>" for group in groups
    ]
    body = []
    for (vlm, setting), own in sorted(
        values.items(), key=lambda item: (item[0][0], item[0][1] != FULL, item[0][1].sort_key)
    ):
        label = "full precision" if setting == FULL else escape(setting.label)
        cells = []
        for column in columns:
            factor, digits = (100, 1) if column[1] == "top_energy" else (1, 2)
            cells.append(f"{factor * float(np.mean(own[column])):.{digits}f}" if column in own else "–")
        body.append([escape(vlm), f"<td class='left'>{label}</td>", *cells])
    return html_table([top, ["VLM", "<th class='left'>setting</th>", *(titles[metric] for _, metric in columns)]], body)


def claims_table(claims: list[Claim]) -> str:
    """Published claims beside the study's own figures, with a verdict and the query that made each."""
    head = [f"<th class='left'>{title}</th>" for title in ("claim", "published", "here", "verdict", "from")]
    body = []
    for c in claims:
        estimate, interval = percent_interval(c.found.estimate, c.found.low, c.found.high)
        vlms = "one VLM" if c.found.n_clusters == 1 else f"{c.found.n_clusters} VLMs"
        cells = (c.published, f"{estimate} {c.unit} {interval}", c.verdict, f"{c.query}; {c.n_cells} models of {vlms}")
        body.append([escape(c.claim), *(f"<td class='left'>{escape(text)}</td>" for text in cells)])
    return html_table([head], body)


def data_table(analysis: StudyAnalysis) -> str:
    """The evaluation data sets with their numbers of samples."""
    rows = analysis.results.about("top1", "auroc")
    rows = rows[rows["role"].isin(list(ROLES)) & (rows["dataset"] != "")]
    body = []
    for role in ROLES:
        own = rows[rows["role"] == role]
        if own.empty:
            continue
        names = list(dict.fromkeys(own["corruption"].replace("", "none") if role == "corruption" else own["dataset"]))
        severities = sorted(own["severity"].unique())
        suffix = f", severities {severities[0]}–{severities[-1]}" if role == "corruption" else ""
        low, high = own["n"].min(), own["n"].max()
        n = f"{low:,}" if low == high else f"{low:,} – {high:,}"
        sets = f"<td class='left'>{escape(', '.join(names) + suffix)}</td>"
        body.append([ROLES[role].heading, sets, n])
    return html_table([["role", "<th class='left'>data sets</th>", "images each"]], body)
