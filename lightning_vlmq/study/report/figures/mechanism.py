"""Quantization's change in every dimension beside what controls do: the explanation put to the test in one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightning_vlmq.study.analysis.mechanism import ALL_VLMS, Verdict, control_order
from lightning_vlmq.study.report.figures.style import BLACK, GREY, LIGHT, MARKERS, PALETTE, new_figure, styled

SHADES = {"reproduces": PALETTE[0], "undecided": LIGHT, "does not": PALETTE[1], "no match": GREY}
"""Colours of the verdicts on settings that have a change."""


def verdict_summary(found: Sequence[Verdict]) -> Figure | None:
    """A row per dimension, a bar per control and surgery: shares of the quantized settings by verdict.

    Settings without a change of their own are left out; the number at a bar's end is how many are left.
    """
    shown = [v for v in found if v.vlm == ALL_VLMS] or list(found)
    told = [v for v in shown if v.found.verdict in SHADES]
    if not told:
        return None
    titles = list(dict.fromkeys(v.dimension.title for v in shown))
    columns = [sorted({v.control for v in shown if v.is_surgery == kind}, key=control_order) for kind in (False, True)]
    names = [name for part in columns for name in part]
    with styled():
        figure = new_figure(1.7 + 1.25 * len(names), 0.42 * len(titles) + 1.5)
        grid = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axis, name in zip(grid, names):
            for row, title in enumerate(titles):
                own = [v.found.verdict for v in told if v.control == name and v.dimension.title == title]
                left = 0.0
                for verdict, colour in SHADES.items():
                    share = own.count(verdict) / max(len(own), 1)
                    axis.barh(-row, share, left=left, color=colour, height=0.7, linewidth=0)
                    left += share
                axis.text(1.04, -row, str(len(own)) if own else "–", fontsize=7, va="center", color=GREY)
            axis.set_title(name.replace("(", "\n("), fontsize=8)
            axis.set_xlim(0, 1.18)
            axis.set_xticks([])
            axis.grid(visible=False)
        grid[0].set_yticks([-row for row in range(len(titles))], titles)
        if columns[1] and columns[0]:
            grid[len(columns[0])].axvline(-0.09, color=BLACK, linewidth=1, clip_on=False)
        handles = [Patch(color=colour, label=verdict) for verdict, colour in SHADES.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(SHADES))
    return figure


def verdict_overview(found: Sequence[Verdict]) -> Figure | None:
    """A panel per dimension, a line per quantized setting: each control's change as a share of quantization's.

    1 is quantization's own change; the band from 0.5 to 1.5 is what counts as the same. A filled mark: the control reproduces
    the change; a hollow one: it does not; a faint one: undecided. Settings without
    a change, and controls that are no match, are left empty.
    """
    shown = [v for v in found if v.vlm == ALL_VLMS and not v.is_surgery] or [v for v in found if not v.is_surgery]
    if not shown:
        return None
    titles = list(dict.fromkeys(v.dimension.title for v in shown))
    settings = sorted(dict.fromkeys(v.quantized for v in shown), key=lambda setting: setting.sort_key)
    controls = list(dict.fromkeys(v.control for v in shown))
    style = {c: (PALETTE[k % len(PALETTE)], MARKERS[k % len(MARKERS)]) for k, c in enumerate(controls)}
    columns = min(len(titles) + 1, 4)
    lines = -(-(len(titles) + 1) // columns)
    with styled():
        figure = new_figure(11.5, lines * (0.3 * len(settings) * max(1, len(controls) / 3) + 1.1))
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for place, (axis, title) in enumerate(zip(grid.flat, titles)):
            axis.axvspan(0.5, 1.5, color=LIGHT, alpha=0.6, linewidth=0)
            axis.axvline(1, color=BLACK, linewidth=1)
            axis.axvline(0, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)))
            for v in (v for v in shown if v.dimension.title == title and not math.isnan(v.found.low)):
                colour, marker = style[v.control]
                y = -settings.index(v.quantized) + 0.3 - 0.6 * (controls.index(v.control) + 0.5) / len(controls)
                alpha = 0.4 if v.found.verdict == "undecided" else 1.0
                face = "white" if v.found.verdict == "does not" else colour
                low, high = (
                    max(v.found.low, -1.6),
                    min(v.found.high, 2.6),
                )  # the axis ends there; the line runs to its edge
                axis.plot([low, high], [y, y], color=colour, linewidth=1, alpha=alpha)
                axis.plot(
                    min(max(v.found.ratio, -1.55), 2.55),
                    y,
                    marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=5,
                    alpha=alpha,
                )
            axis.set_title(title, fontsize=9)
            axis.set_yticks(
                [-k for k in range(len(settings))], [s.label for s in settings] if place % columns == 0 else []
            )
            axis.set_ylim(-len(settings) + 0.5, 0.5)
            axis.set_xlim(-1.6, 2.6)
            axis.grid(axis="y", visible=False)
        for axis in grid.flat[len(titles) :]:
            axis.axis("off")
        handles: list[Artist] = [
            Line2D([], [], color=colour, marker=marker, linestyle="", label=control)
            for control, (colour, marker) in style.items()
        ]
        handles += [
            Line2D([], [], color=GREY, marker="o", linestyle="", label="filled: reproduces"),
            Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label="hollow: does not"),
            Line2D([], [], color=GREY, marker="o", linestyle="", alpha=0.4, label="faint: undecided"),
            Patch(color=LIGHT, label="counts as the same"),
        ]
        grid.flat[len(titles)].legend(handles=handles, loc="center left")
        figure.supxlabel("control's change / quantization's change", fontsize=9)
    return figure
