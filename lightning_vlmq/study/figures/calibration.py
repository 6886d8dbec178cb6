"""Reliability diagrams before and after quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_vlmq.study.comparison import FULL, StudyAnalysis
from lightning_vlmq.study.diagnostics import Diagnostics
from lightning_vlmq.study.figures.style import (
    BLACK,
    GREY,
    LIGHT,
    bits_styles,
    in_percent,
    new_figure,
    scope_dashes,
    styled,
)

MIN_COUNT = 10
"""Bins with fewer samples are left out of the lines: their accuracy is noise."""


def reliability_diagrams(analysis: StudyAnalysis) -> Figure | None:
    """Accuracy over confidence, full precision in black; one column a VLM, one row a method."""
    vlms = [vlm for vlm in analysis.vlms if (vlm, FULL) in analysis.diagnostics]
    methods = list(dict.fromkeys(setting.method for setting in analysis.settings))
    if not vlms or not methods:
        return None
    colours, dashes = bits_styles(analysis.settings), scope_dashes(analysis.settings)
    with styled():
        figure = new_figure(max(2.75 * len(vlms), 6) + 0.5, 2.75 * len(methods) + 0.7)
        grid = figure.subplots(len(methods), len(vlms), squeeze=False, sharex=True, sharey=True)
        for line, method in enumerate(methods):
            for column, vlm in enumerate(vlms):
                axis = grid[line, column]
                axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
                full = analysis.diagnostics[vlm, FULL]
                _histogram(axis, full)
                for setting in analysis.settings:
                    found = analysis.diagnostics.get((vlm, setting))
                    if setting.method == method and found:
                        _line(axis, found, color=colours[setting.bits], linestyle=dashes[setting.scope], linewidth=1.4)
                _line(axis, full, color=BLACK, linewidth=1.8, marker="o", markersize=2.6)
                axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
                axis.set_title(vlm if line == 0 else "")
                in_percent(axis, "x")
                in_percent(axis, "y")
            grid[line, 0].set_ylabel(f"{method}\naccuracy, %")
        for axis in grid[-1]:
            axis.set_xlabel("confidence, %")
        handles = [Line2D([], [], color=BLACK, linewidth=1.8, marker="o", markersize=3, label="full precision")]
        handles += [Line2D([], [], color=colour, linewidth=1.6, label=bits) for bits, colour in colours.items()]
        handles += [Line2D([], [], color=GREY, linestyle=dash, label=scope) for scope, dash in dashes.items()]
        handles.append(Line2D([], [], color=LIGHT, linewidth=6, label="share of images (full precision)"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7))
    return figure


def _line(axis: Axes, diagnostics: Diagnostics, **style: Any) -> None:
    bins = diagnostics.bins
    enough = (bins.count >= MIN_COUNT).numpy()
    confidence, accuracy = (bins.confidence / bins.count).numpy(), (bins.correct / bins.count).numpy()
    axis.plot(confidence[enough], accuracy[enough], **style)


def _histogram(axis: Axes, diagnostics: Diagnostics) -> None:
    count = diagnostics.bins.count.numpy()
    share = count / count.sum()
    centres = (np.arange(len(share)) + 0.5) / len(share)
    axis.bar(centres, share, width=0.9 / len(share), color=LIGHT, zorder=0.5)
