"""Reliability diagrams, on figures of their own: no pyplot, no global state, nothing left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_vlmq.metrics import ReliabilityBins, TrajectoryBins
from lightning_vlmq.plotting.base import BLUE, DPI, FIFTHS, GREY, VERMILION, draw_legend, plain_text


@dataclass(frozen=True, eq=False)
class ReliabilityPanel:
    """One model's part of a reliability diagram.

    Args:
        label: the model, e.g. ``"FP32"``.
        bins: counts, mean confidence and accuracy per bin, of at least one sample.
        ece: expected calibration error as a fraction.
    """

    label: str
    bins: ReliabilityBins
    ece: float


@plain_text
def reliability_diagram(panels: Sequence[ReliabilityPanel], title: str) -> Figure:
    """Accuracy over confidence above a histogram of confidence, one column per model (Guo et al. 2017, figure 1).

    Args:
        panels: at least one; equal-width bins over [0, 1].
        title: of the figure.
    """
    width = max(3.1 * len(panels) + 0.7, 4.6)
    figure = Figure(figsize=(width, 4.2), dpi=DPI)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.15 / width, top=0.83, bottom=0.11, wspace=0.12, hspace=0.1)
    grid = figure.add_gridspec(2, len(panels), height_ratios=(3, 1))
    shares = [(panel.bins.count / panel.bins.count.sum()).cpu().numpy() for panel in panels]
    tallest = float(np.max(shares))
    for column, (panel, share) in enumerate(zip(panels, shares, strict=True)):
        edges, accuracy, confidence = (
            values.cpu().numpy() for values in (panel.bins.edges, panel.bins.accuracy, panel.bins.confidence)
        )
        axes = figure.add_subplot(grid[0, column])
        axes.stairs(accuracy, edges, fill=True, color=BLUE, alpha=0.75, label="accuracy")
        axes.stairs(
            confidence,
            edges,
            baseline=accuracy,
            fill=True,
            color="none",
            edgecolor=VERMILION,
            hatch="////",
            linewidth=0.8,
            label="gap to mean confidence",
        )
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
        axes.set_title(f"{panel.label}: ECE {panel.ece:.1%}", fontsize=9, y=1.0, pad=4)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=FIFTHS, yticks=FIFTHS, xticklabels=[])
        histogram = figure.add_subplot(grid[1, column])
        histogram.stairs(share, edges, fill=True, color=GREY)
        histogram.set(xlim=(0, 1), ylim=(0, 1.08 * tallest), xticks=FIFTHS)
        histogram.set_xlabel("confidence", fontsize=8)
        for part, name in ((axes, "accuracy"), (histogram, "share")):
            part.tick_params(labelsize=7, length=2)
            if column == 0:
                part.set_ylabel(name, fontsize=8)
                part.yaxis.set_label_coords(-0.42 / width * len(panels), 0.5)
            else:
                part.set_yticklabels([])
    figure.text(0.5, 0.985, title, fontsize=10, ha="center", va="top")
    draw_legend(figure, figure.axes[0].get_legend_handles_labels()[0], 0.945)
    return figure


@plain_text
def trajectory_diagram(bins: TrajectoryBins, labels: Sequence[str], title: str) -> Figure:
    """Where the images of each confidence bin of the first model lie under the others: accuracy over confidence, a path a bin.

    Args:
        bins: from :func:`~lightning_vlmq.metrics.trajectory_bins`; marks grow with the number of images.
        labels: of the models, at most four.
        title: of the figure.
    """
    figure = Figure(figsize=(4.6, 4.6), dpi=DPI)
    axes = figure.add_axes((0.13, 0.1, 0.83, 0.76))
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    confidence, accuracy = bins.confidence.cpu().numpy(), bins.accuracy.cpu().numpy()
    sizes = 14 + 160 * (bins.count / bins.count.sum()).cpu().numpy()
    axes.plot(confidence, accuracy, color=GREY, linewidth=0.9, zorder=1)
    looks = ((GREY, "o"), (VERMILION, "s"), (BLUE, "^"), ("black", "D"))
    for x, y, label, (color, marker) in zip(confidence, accuracy, labels, looks):
        axes.scatter(x, y, sizes, color=color, marker=marker, alpha=0.85, linewidths=0, label=label, zorder=2)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=FIFTHS, yticks=FIFTHS)
    axes.set_xlabel("mean confidence", fontsize=8)
    axes.set_ylabel("accuracy", fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    figure.text(0.5, 0.985, title, fontsize=10, ha="center", va="top")
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=label) for label, (c, m) in zip(labels, looks)]
    draw_legend(figure, handles, 0.945)
    return figure
