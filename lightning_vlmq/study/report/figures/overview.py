"""The change in every reliability dimension at one glance, and the spurious gap before and after."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_vlmq.evaluation.measures import Dimension, Measure, dimensions
from lightning_vlmq.statistics import Interval
from lightning_vlmq.study.analysis.change import FULL, Comparison, average_effect
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.style import (
    BLACK,
    GREY,
    LIGHT,
    in_percent,
    label_last_line,
    method_colours,
    new_figure,
    scope_dashes,
    significance_keys,
    styled,
    vlm_keys,
    vlm_styles,
)

_MANY_ROWS = 16
"""From here on, the scale is written above the rows too."""
_MOST_HIGH_ROWS = 64
"""With more, rows are as high as their labels; else high enough for a mark a VLM."""


def overview(analysis: StudyAnalysis) -> Figure | None:
    """Change against full precision by dimension, setting and VLM, with 95 % intervals; right is always worse."""
    shown = [d for d in dimensions(analysis.score) if analysis.changes(d.measure)]
    if not shown:
        return None
    rows = {setting: -position for position, setting in _spaced(analysis.settings)}
    columns = min(len(shown) + 1, 4)
    lines = -(-(len(shown) + 1) // columns)
    with styled():
        row_height = 0.16 + (0.035 * len(analysis.vlms) if len(rows) <= _MOST_HIGH_ROWS else 0.04)
        figure = new_figure(11.5, lines * (row_height * (1 - min(rows.values())) + 1.05))
        grid = figure.subplots(lines, columns, squeeze=False)
        for place, (axis, dimension) in enumerate(zip(grid.flat, shown)):
            _panel(axis, analysis, dimension, rows)
            _label_rows(axis, rows, place % columns == 0)
        for axis in grid.flat[len(shown) :]:
            axis.axis("off")
        _legend(grid.flat[len(shown)], analysis)
    return figure


def _spaced(settings: list[Setting]) -> list[tuple[float, Setting]]:
    """Row positions from the top, a little room between methods."""
    placed, position = [], 0.0
    for _, members in groupby(settings, key=lambda setting: setting.method):
        for setting in members:
            placed.append((position, setting))
            position += 1
        position += 0.8
    return placed


def _panel(axis: Axes, analysis: StudyAnalysis, dimension: Dimension, rows: dict[Setting, float]) -> None:
    styles = vlm_styles(analysis.vlms)
    spread = 0.62 / max(len(styles), 1)
    axis.axvline(0, color=GREY, linewidth=1)
    found: dict[Setting, list[Comparison]] = {}
    for place, (vlm, (colour, marker)) in enumerate(styles.items()):
        heights, effects = [], []
        for setting, y in rows.items():
            comparison = analysis.comparisons.get((vlm, setting, dimension.measure))
            if comparison is not None and comparison.effect is not None:
                found.setdefault(setting, []).append(comparison)
                heights.append(y + 0.31 - spread * (place + 0.5))
                effects.append(comparison.effect)
        look = {"color": colour, "markersize": 3.6, "markeredgewidth": 0}
        _intervals(
            axis, heights, effects, {"color": colour, "linewidth": 0.9, "alpha": 0.55}, {"marker": marker, **look}
        )
    means = {rows[setting]: average_effect(own) for setting, own in found.items() if len(own) > 1}
    look = {"color": "white", "markeredgecolor": BLACK, "markeredgewidth": 1.3, "markersize": 5}
    _intervals(axis, list(means), list(means.values()), {"color": BLACK, "linewidth": 2}, {"marker": "D", **look})
    axis.set_title(dimension.title)
    axis.set_xlabel(f"{dimension.effect}   (worse →)")
    axis.tick_params(axis="x", labeltop=len(rows) > _MANY_ROWS)
    in_percent(axis, "x", signed=True)
    axis.margins(x=0.06)
    axis.grid(axis="y", visible=False)
    axis.locator_params(axis="x", nbins=5)
    if not dimension.measure.worse_is_positive:
        axis.invert_xaxis()


def _intervals(
    axis: Axes, heights: list[float], effects: list[Interval], line: dict[str, Any], mark: dict[str, Any]
) -> None:
    """Intervals with their estimates, as one collection and one line of marks: a study has thousands."""
    if effects:
        estimates, _, lows, highs = zip(*effects)
        axis.hlines(heights, lows, highs, **line)
        axis.plot(estimates, heights, linestyle="", **mark)


def _label_rows(axis: Axes, rows: dict[Setting, float], is_first: bool) -> None:
    axis.set_ylim(min(rows.values()) - 0.7, 0.9)
    axis.set_yticks(list(rows.values()), [s.details for s in rows] if is_first else [])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    tops: dict[str, float] = {}
    for setting, y in rows.items():
        tops[setting.method] = max(y, tops.get(setting.method, y))
    for setting, y in rows.items():
        if y == tops[setting.method]:
            axis.axhline(y + 0.55, color=LIGHT, linewidth=0.8)
            if is_first:
                place = axis.get_yaxis_transform()
                axis.text(-0.03, y + 0.62, setting.method, transform=place, ha="right", va="bottom", weight="bold")


def _legend(axis: Axes, analysis: StudyAnalysis) -> None:
    handles = vlm_keys(analysis.vlms, linewidth=1)
    if len(handles) > 1:
        mean = Line2D([], [], color=BLACK, linewidth=2, marker="D", markersize=5, label="mean over VLMs")
        mean.set_markerfacecolor("white")
        handles.append(mean)
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="full precision"))
    axis.legend(handles=handles, loc="center left", title="lines: 95 % intervals", alignment="left")


def spurious_gap_slopes(analysis: StudyAnalysis) -> Figure | None:
    """Relative spurious gap of full precision and of every setting, one panel per VLM."""
    measure = Measure("rsg", "spurious")
    vlms = [vlm for vlm in analysis.vlms if analysis.changes(measure, vlm)]
    if not vlms:
        return None
    colours, dashes = method_colours(analysis.settings), scope_dashes(analysis.settings)
    bits = list(dict.fromkeys(setting.bits for setting in analysis.settings))
    beside = {name: [setting for setting in analysis.settings if setting.bits == name] for name in bits}
    where = {
        setting: 1 + place + 0.55 * ((k + 0.5) / len(beside[name]) - 0.5)
        for place, name in enumerate(bits)
        for k, setting in enumerate(beside[name])
    }
    columns = min(len(vlms), 4)
    lines = -(-len(vlms) // columns)
    with styled():
        figure = new_figure(11.5, 3.1 * lines + 0.7)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
        for axis, vlm in zip(grid.flat, vlms):
            full = analysis.comparisons[vlm, FULL, measure]
            known = {s: c for s in analysis.settings if (c := analysis.comparisons.get((vlm, s, measure))) and c.change}
            x, ends = [where[setting] for setting in known], [c.value for c in known.values()]
            colour = [colours[setting.method] for setting in known]
            lines_to = [((0, full.value), end) for end in zip(x, ends)]
            dash = [dashes[setting.scope] for setting in known]
            axis.add_collection(LineCollection(lines_to, colors=colour, linestyles=dash, linewidths=1.2, alpha=0.7))
            low, high = ([full.value + getattr(c.change, end) for c in known.values()] for end in ("low", "high"))
            axis.vlines(x, low, high, colors=colour, linewidth=1, alpha=0.5)
            face = [tone if c.is_significant else "white" for tone, c in zip(colour, known.values())]
            axis.scatter(x, ends, s=25, facecolors=face, edgecolors=colour, linewidths=1, zorder=2)
            axis.plot(0, full.value, "o", color=BLACK, markersize=6)
            axis.set_title(vlm)
            axis.set_xticks(range(len(bits) + 1), ["FP32", *bits])
            axis.set_xlim(-0.25, len(bits) + 0.45)
            axis.grid(axis="x", visible=False)
            in_percent(axis, "y")
        for axis in grid[:, 0]:
            axis.set_ylabel("relative spurious gap, %")
        for axis in grid.flat[len(vlms) :]:
            axis.axis("off")
        label_last_line(grid)
        handles = [Line2D([], [], color=colour, label=method) for method, colour in colours.items()]
        handles += [Line2D([], [], color=GREY, linestyle=dash, label=scope) for scope, dash in dashes.items()]
        handles += significance_keys()
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    return figure
