"""Accuracy under corruption, and which predictions quantization changes."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightning_vlmq.statistics import Z95
from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.diagnostics import Accuracy, Diagnostics
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.style import (
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    GREY,
    VERMILION,
    in_percent,
    label_last_line,
    method_colours,
    new_figure,
    panel_grid,
    styled,
)
from lightning_vlmq.study.report.notation import signed


def _severities(diagnostics: Diagnostics) -> dict[int, Accuracy]:
    """Accuracy by severity, averaged over corruptions; severity 0 is the clean in-distribution data.

    The corruptions are of the same images, so their standard errors are averaged, not shrunk.
    """
    found: dict[int, list[Accuracy]] = {}
    for (_, severity), accuracy in diagnostics.corruption.items():
        found.setdefault(severity, []).append(accuracy)
    means = {s: Accuracy(*(float(np.mean(part)) for part in zip(*found[s]))) for s in sorted(found)}
    return {0: diagnostics.clean, **means}


def corruption_curves(analysis: StudyAnalysis) -> Figure | None:
    """Accuracy over severity, averaged over corruptions: one panel per VLM and scope."""
    vlms = [vlm for vlm in analysis.vlms if getattr(analysis.diagnostics.get((vlm, FULL)), "corruption", None)]
    scopes = list(dict.fromkeys(setting.scope for setting in analysis.settings))
    if not vlms or not scopes:
        return None
    colours = method_colours(analysis.settings)
    bits = list(dict.fromkeys(setting.bits for setting in analysis.settings))
    with styled():
        figure, panels = panel_grid(scopes, vlms, 1.95, "severity (0: clean)", "top-1, %")
        for (scope, vlm), axis in panels.items():
            full = _severities(analysis.diagnostics[vlm, FULL])
            low, high = ([a.value + sign * Z95 * a.stderr for a in full.values()] for sign in (-1, 1))
            axis.fill_between(list(full), low, high, color=BLACK, alpha=0.08, linewidth=0)
            for setting in analysis.settings:
                found = analysis.diagnostics.get((vlm, setting))
                if setting.scope != scope or found is None or not found.corruption:
                    continue
                curve = _severities(found)
                dash = DASHES[bits.index(setting.bits) % len(DASHES)]
                line_style = {"color": colours[setting.method], "linestyle": dash, "linewidth": 1.4}
                axis.plot(list(curve), [a.value for a in curve.values()], **line_style)
            values = [a.value for a in full.values()]
            axis.plot(list(full), values, color=BLACK, linewidth=1.8, marker="o", markersize=3)
            in_percent(axis, "y")
        handles = [Line2D([], [], color=BLACK, marker="o", markersize=3, linewidth=1.8, label="full precision")]
        handles += [Line2D([], [], color=colour, label=method) for method, colour in colours.items()]
        handles += [Line2D([], [], color=GREY, linestyle=DASHES[i % len(DASHES)], label=b) for i, b in enumerate(bits)]
        figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 8))
    return figure


def corruption_changes(analysis: StudyAnalysis) -> Figure | None:
    """Accuracy change by setting and corruption, averaged over severities and VLMs, in points."""
    changes = {setting: _changes(analysis, setting) for setting in analysis.settings}
    names = sorted({name for own in changes.values() for name in own})
    if not names:
        return None
    image = np.array([[np.mean(own.get(name, [np.nan])) for name in names] for own in changes.values()])
    limit = max(float(np.nanmax(np.abs(image))), 1e-3)
    with styled():
        figure = new_figure(max(0.95 * len(names), 3) + 3.4, 0.27 * len(changes) + 1.3)
        axis = figure.subplots()
        mesh = axis.imshow(image, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_yticks(range(len(changes)), [setting.label for setting in changes])
        axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        for y, line in enumerate(image):
            for x, value in enumerate(line):
                text = signed(100 * value, 1 if limit > 0.03 else 2)
                colour = "white" if abs(value) > 0.6 * limit else BLACK
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
        bar = figure.colorbar(mesh, ax=axis, pad=0.02)
        bar.set_label("Δ top-1, points")
        bar.outline.set_visible(False)  # type: ignore[operator]
        in_percent(bar.ax, "y", signed=True)
    return figure


def _changes(analysis: StudyAnalysis, setting: Setting) -> dict[str, list[float]]:
    """Changes of accuracy in one setting by corruption, one for each severity and VLM."""
    changes: dict[str, list[float]] = {}
    for vlm in analysis.vlms:
        full, quantized = (analysis.diagnostics.get((vlm, which)) for which in (FULL, setting))
        if full is None or quantized is None:
            continue
        for key, accuracy in quantized.corruption.items():
            if key in full.corruption:
                changes.setdefault(key[0], []).append(accuracy.value - full.corruption[key].value)
    return changes


def prediction_flips(analysis: StudyAnalysis) -> Figure | None:
    """Shares of images whose prediction quantization changes, by what became of it; one panel per VLM."""
    vlms = [vlm for vlm in analysis.vlms if any((vlm, s) in analysis.diagnostics for s in analysis.settings)]
    if not vlms:
        return None
    kinds = {
        "broken": ("right → wrong", VERMILION),
        "repaired": ("wrong → right", GREEN),
        "moved": ("wrong → wrong", BLUE),
    }
    columns = min(len(vlms), 4)
    lines = -(-len(vlms) // columns)
    with styled():
        figure = new_figure(11.5, lines * (0.24 * len(analysis.settings) + 0.8) + 0.4)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axis, vlm in zip(grid.flat, vlms):
            for y, setting in enumerate(analysis.settings):
                left = 0.0
                for kind, (_, colour) in kinds.items():
                    found = analysis.diagnostics.get((vlm, setting))
                    width = found.flips[kind] if found else 0.0
                    axis.barh(y, width, left=left, color=colour, height=0.68)
                    left += width
            axis.set_title(vlm)
            axis.set_yticks(range(len(analysis.settings)), [s.label for s in analysis.settings])
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", visible=False)
            in_percent(axis, "x")
        grid[0, 0].invert_yaxis()  # shared: the first setting on top everywhere
        for axis in grid.flat[len(vlms) :]:
            axis.axis("off")
        label_last_line(grid)
        handles = [Patch(color=colour, label=title) for title, colour in kinds.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, title="changed predictions, %")
    return figure
