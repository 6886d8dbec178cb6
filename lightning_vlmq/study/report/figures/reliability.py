"""Reliability diagrams before and after quantization, and after tuning the logit scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_vlmq.metrics.functional import TrajectoryBins
from lightning_vlmq.quant.scheme import SCOPES
from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.diagnostics import Diagnostics
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.style import (
    BLACK,
    BLUE,
    GREY,
    LIGHT,
    VERMILION,
    bits_styles,
    in_percent,
    panel_grid,
    scope_dashes,
    styled,
)

MIN_COUNT = 10
"""Bins with fewer samples are left out of the lines: their accuracy is noise."""


def reliability_diagrams(analysis: StudyAnalysis) -> Figure | None:
    """Accuracy over confidence, full precision in black; one panel per VLM and method."""
    vlms = [vlm for vlm in analysis.vlms if (vlm, FULL) in analysis.diagnostics]
    methods = list(dict.fromkeys(setting.method for setting in analysis.settings))
    if not vlms or not methods:
        return None
    colours, dashes = bits_styles(analysis.settings), scope_dashes(analysis.settings)
    with styled():
        figure, panels = panel_grid(methods, vlms, 2.45, "confidence, %", "accuracy, %")
        for (method, vlm), axis in panels.items():
            full = analysis.diagnostics[vlm, FULL]
            _histogram(axis, full)
            for setting in analysis.settings:
                found = analysis.diagnostics.get((vlm, setting))
                if setting.method == method and found:
                    _line(axis, found, color=colours[setting.bits], linestyle=dashes[setting.scope], linewidth=1.4)
            _line(axis, full, color=BLACK, linewidth=1.8, marker="o", markersize=2.6)
            _unit_square(axis)
        handles = [Line2D([], [], color=BLACK, linewidth=1.8, marker="o", markersize=3, label="full precision")]
        handles += [Line2D([], [], color=colour, linewidth=1.6, label=bits) for bits, colour in colours.items()]
        handles += [Line2D([], [], color=GREY, linestyle=dash, label=scope) for scope, dash in dashes.items()]
        handles.append(Line2D([], [], color=LIGHT, linewidth=6, label="share of images (full precision)"))
        figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 7))
    return figure


def reliability_trajectories(analysis: StudyAnalysis) -> Figure | None:
    """Each confidence bin followed from full precision to quantized to tuned; one panel per VLM and method.

    Of each method the setting with the fewest bits and the widest scope.
    """
    shown: dict[tuple[str, str], TrajectoryBins] = {}
    for setting in sorted(analysis.settings, key=_coarseness):  # the coarsest comes last and stays
        for vlm in analysis.vlms:
            if (vlm, setting) in analysis.trajectories:
                shown[setting.method, vlm] = analysis.trajectories[vlm, setting]
    if not any(len(bins.confidence) > 2 for bins in shown.values()):
        return None
    methods = [
        method
        for method in dict.fromkeys(s.method for s in analysis.settings)
        if method in {method for method, _ in shown}
    ]
    vlms = [vlm for vlm in analysis.vlms if vlm in {vlm for _, vlm in shown}]
    stages = (("full precision", BLACK, "o"), ("quantized", VERMILION, "s"), ("logit scale tuned", BLUE, "^"))
    with styled():
        figure, panels = panel_grid(methods, vlms, 2.45, "confidence, %", "accuracy, %")
        for (method, vlm), axis in panels.items():
            if bins := shown.get((method, vlm)):
                enough = (bins.count >= MIN_COUNT).numpy()
                confidence, accuracy = bins.confidence.numpy()[:, enough], bins.accuracy.numpy()[:, enough]
                axis.plot(confidence, accuracy, color=GREY, linewidth=0.8)
                for x, y, (_, colour, marker) in zip(confidence, accuracy, stages):
                    axis.plot(x, y, marker, color=colour, markersize=3.6, markeredgewidth=0)
            _unit_square(axis)
        handles = [Line2D([], [], color=c, marker=m, linestyle="", label=title) for title, c, m in stages]
        figure.legend(handles=handles, loc="lower center", ncols=3)
    return figure


def _coarseness(setting: Setting) -> tuple[int, int, int]:
    return -setting.weight_bits, -setting.act_bits, len(SCOPES[setting.scope]) if setting.scope in SCOPES else 0


def _unit_square(axis: Axes) -> None:
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.6)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    in_percent(axis, "x")
    in_percent(axis, "y")


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
