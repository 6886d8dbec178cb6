"""How learned grids move in training, on a figure of its own: no pyplot, no global state, nothing left open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_vlmq.plotting.base import BLUE, DASHED, DPI, GREY, VERMILION, draw_legend


def grid_trajectories(
    steps: Sequence[int],
    changes: Mapping[str, Sequence[Sequence[float]]],
    clipped: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Changes of steps and offsets over updates, one panel a kind, and the shares of clipped values in a last one.

    Args:
        steps: updates at which the grids were looked at, at least one.
        changes: by kind, for each of them the smallest change, the 5 % quantile, the median, the 95 % quantile and the largest.
        clipped: by side, for each of them the share of its values beyond their grid.
        title: of the figure.
    """
    panels = len(changes) + 1
    width = 2.7 * panels + 0.5
    figure = Figure(figsize=(width, 3.1), dpi=DPI)
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.15 / width, top=0.74, bottom=0.15, wspace=0.44)
    marker = "o" if len(steps) == 1 else None
    for column, (kind, rows) in enumerate(changes.items()):
        axes = figure.add_subplot(1, panels, column + 1)
        least, low, median, high, most = zip(*rows, strict=True)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(steps, median, color=BLUE, linewidth=1.4, marker=marker, markersize=3)
        for edge in (least, most):
            axes.plot(steps, edge, color=BLUE, linewidth=0.7, linestyle=DASHED, marker=marker, markersize=2)
        axes.set_title(kind.replace("_", " "), fontsize=9, pad=4)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("of the range" if kind.endswith("offsets") else "of the step at the start", fontsize=8)
    last = figure.add_subplot(1, panels, panels)
    for (side, shares), color in zip(clipped.items(), (BLUE, VERMILION)):
        last.plot(steps[-len(shares) :], shares, color=color, label=side, linewidth=1.4, marker=marker, markersize=3)
    last.set_title("clipped values", fontsize=9, pad=4)
    last.yaxis.set_major_formatter(PercentFormatter(1))
    last.set_ylim(bottom=0)
    last.legend(fontsize=7, frameon=False)
    for axes in figure.axes:
        axes.tick_params(labelsize=7, length=2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("updates", fontsize=8)
    figure.text(0.5, 0.985, title, fontsize=10, ha="center", va="top")
    handles = [
        Line2D([], [], color=BLUE, label="median"),
        Patch(facecolor=BLUE, alpha=0.25, label="5 to 95 % of the tensors' entries"),
        Line2D([], [], color=BLUE, linewidth=0.7, linestyle=DASHED, label="smallest and largest"),
    ]
    draw_legend(figure, handles, 0.92)
    return figure
