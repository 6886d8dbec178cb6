"""Reliability changes over the damage done, so that small and large models, and few and many bits, can be compared at equal damage."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lightning_vlmq.evaluation.measures import dimensions
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.tradeoffs import damage
from lightning_vlmq.study.report.figures.style import (
    GREY,
    in_percent,
    new_figure,
    significance_keys,
    styled,
    vlm_keys,
    vlm_styles,
)


def effects_over_damage(analysis: StudyAnalysis) -> Figure | None:
    """Effect of every VLM and setting over its output SQNR, one panel per dimension; up is worse, right is more damage."""
    known = damage(analysis)
    shown = [d for d in dimensions(analysis.score) if analysis.changes(d.measure)]
    if len(known) < 2 or not shown:
        return None
    styles = vlm_styles(analysis.vlms)
    columns = min(len(shown), 4)
    lines = -(-len(shown) // columns)
    with styled():
        figure = new_figure(11.5, 2.7 * lines + 0.6)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for axis, dimension in zip(grid.flat, shown):
            axis.axhline(0, color=GREY, linewidth=1)
            for vlm, (colour, marker) in styles.items():
                found = [
                    (known[name, setting], comparison)
                    for name, setting, comparison in analysis.comparisons.of(dimension.measure)
                    if name == vlm and (name, setting) in known
                ]
                if found:
                    x, y = (np.array(part) for part in zip(*((db, c.effect.estimate) for db, c in found if c.effect)))
                    sure = np.array([c.is_significant for _, c in found])
                    face = {
                        "markersize": 3.4,
                        "markeredgewidth": 0.7,
                        "linestyle": "",
                        "marker": marker,
                        "color": colour,
                    }
                    axis.plot(x[sure], y[sure], **face)
                    axis.plot(x[~sure], y[~sure], **face, markerfacecolor="white")
            axis.set_title(dimension.title)
            axis.set_ylabel(dimension.effect)
            in_percent(axis, "y", signed=True)
            if not dimension.measure.worse_is_positive:
                axis.invert_yaxis()
        grid.flat[0].invert_xaxis()
        for axis in grid.flat[len(shown) :]:
            axis.axis("off")
        for axis in grid[-1]:
            axis.set_xlabel("output SQNR, dB   (more damage →)")
        handles = vlm_keys(analysis.vlms, linestyle="") + significance_keys()
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure
