"""What quantization does to the activations after every block, rank by rank: SQNR and gain as curves, and layer by rank."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from lightning_vlmq.plotting.activations import rank_windows
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.spectra import harshest_runs, title_of
from lightning_vlmq.study.report.figures.style import BLACK, LIGHT, new_figure_with_margins, styled

COLUMNS = 48
"""Relative ranks of a map."""
PANELS = 4
"""Settings beside each other."""


class SiteCurve(NamedTuple):
    """One site's activations on full precision's basis, largest rank first, each float64 ``[r]``.

    Attributes:
        energy: of full precision, per rank.
        sqnr_db: signal over noise; not finite where there is no noise.
        gain: 1 where nothing is damped.
    """

    energy: NDArray[np.float64]
    sqnr_db: NDArray[np.float64]
    gain: NDArray[np.float64]

    def pooled(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Middle rank, SQNR in dB and gain of windows a factor of the square root of 2 wide: one rank's gain is mostly noise."""
        edges = rank_windows(len(self.energy))
        noise = self.energy / 10 ** (np.where(np.isfinite(self.sqnr_db), self.sqnr_db, np.inf) / 10)
        sums = [
            np.array([x[a:b].sum() for a, b in pairwise(edges)]) for x in (self.energy, noise, self.energy * self.gain)
        ]
        with np.errstate(divide="ignore"):
            sqnr = 10 * np.log10(sums[0] / sums[1])
        return np.sqrt((edges[:-1] + 1.0) * edges[1:]), np.where(np.isfinite(sqnr), sqnr, np.nan), sums[2] / sums[0]


Ranks = Mapping[Setting, Mapping[str, SiteCurve]]
"""Curves by setting and site, ``vision/block 0``; sites in the model's order, a tower's output last."""


def read_ranks(analysis: StudyAnalysis, vlm: str) -> Ranks:
    """Recorded activations of a VLM in the settings with the fewest weight bits and the widest scope; with several seeds, the first one's.

    Empty where runs recorded none, see :class:`~lightning_vlmq.callbacks.ActivationSpectrum`.
    """
    found: dict[Setting, dict[str, SiteCurve]] = {}
    for run in harshest_runs(analysis, vlm):
        curves = run.store.curves(run.run_id)
        own = {kind: curves[curves["kind"] == kind] for kind in ("eigenvalues", "sqnr_db", "gain")}
        sites = {str(site): _site(own, str(site)) for site in dict.fromkeys(own["gain"]["layer"])}
        if sites:
            found[run.setting] = sites
    return found


def _site(curves: Mapping[str, pd.DataFrame], site: str) -> SiteCurve:
    columns = {"eigenvalues": "y_reference", "sqnr_db": "y", "gain": "y"}
    parts = (
        curves[kind][curves[kind]["layer"] == site].sort_values("x")[y].to_numpy(float) for kind, y in columns.items()
    )
    return SiteCurve(*parts)


def rank_curves(found: Ranks, tower: str) -> Figure | None:
    """A column per setting: SQNR above, gain below, over rank; a line per block from dark (first) to light, the output black."""
    panels = {s: {n: c for n, c in sites.items() if n.startswith(f"{tower}/")} for s, sites in found.items()}
    panels = {setting: sites for setting, sites in panels.items() if sites}
    if not panels:
        return None
    columns, lines = min(len(panels), PANELS), -(-len(panels) // PANELS)
    gains: list[NDArray[np.float64]] = []
    with styled():
        width, height = 2.5 * columns + 0.85, 3.5 * lines + 0.9
        figure = new_figure_with_margins(width, height, left=0.7, right=0.15, top=0.42, bottom=0.85)
        spacing = {"wspace": 0.1, "hspace": 0.3}
        grid = figure.subplots(2 * lines, columns, squeeze=False, sharex=True, gridspec_kw=spacing)
        for axis in grid.flat:
            axis.axis("off")
        for place, (setting, sites) in enumerate(panels.items()):
            upper, lower = grid[2 * (place // PANELS) : 2 * (place // PANELS) + 2, place % PANELS]
            lower.axhline(1, color=BLACK, linewidth=0.8)
            blocks = [name for name in sites if not name.endswith("output")]
            colours = dict(zip(blocks, colormaps["viridis"](np.linspace(0, 0.85, max(len(blocks), 2)))))
            for name, curve in sites.items():
                rank, sqnr, gain = curve.pooled()
                style = {"color": colours.get(name, BLACK), "linewidth": 1.3}
                upper.plot(rank, sqnr, **style)
                lower.plot(rank, gain, **style)
                gains.append(gain)
            upper.set_title(title_of(setting), fontsize=8.5)
            for axis, label in ((upper, "SQNR, dB"), (lower, "gain (1: not damped)")):
                axis.axis("on")
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(LogLocator(10))
                axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
                axis.xaxis.set_minor_formatter(NullFormatter())
                if place % PANELS == 0:
                    axis.set_ylabel(label)
                else:
                    axis.tick_params(labelleft=False)
            lower.tick_params(labelbottom=True)
        low, high = np.nanquantile(
            np.concatenate(gains), [0.02, 0.98]
        )  # ranks of next to no energy must not flatten the rest
        margin = 0.1 * max(high - low, 1e-3)
        for row, axes in enumerate(grid):
            used = [axis for axis in axes if axis.axison]
            limits = (min(low, 1) - margin, max(high, 1) + margin) if row % 2 else _span(used)
            for axis in used:
                axis.set_ylim(*limits)
        figure.supxlabel("rank on full precision's basis", y=0.4 / height, fontsize=9)
        names = next(iter(panels.values()))
        ends = [colormaps["viridis"](x) for x in (0.0, 0.85)]
        handles = [Line2D([], [], color=c, label=label) for c, label in zip(ends, ("first block", "last block"))]
        if any(name.endswith("output") for name in names):
            handles.append(Line2D([], [], color=BLACK, label="output"))
        figure.legend(handles=handles, loc="lower center", ncols=3)
    return figure


def _span(axes: list) -> tuple[float, float]:
    limits = [axis.get_ylim() for axis in axes]
    return min(low for low, _ in limits), max(high for _, high in limits)


def rank_maps(found: Ranks) -> Figure | None:
    """Layer by relative rank, 0 the largest: SQNR in the first line of panels, gain in the second; a column per setting."""
    if not found:
        return None
    sites = list(dict.fromkeys(name for own in found.values() for name in own))
    absent = np.full(COLUMNS, np.nan)
    images = {
        quantity: {
            s: np.stack([_relative(own[n], quantity) if n in own else absent for n in sites])
            for s, own in found.items()
        }
        for quantity in ("sqnr_db", "gain")
    }
    spread = max(float(np.nanquantile(np.abs(np.stack(list(images["gain"].values())) - 1), 0.98)), 1e-3)
    levels = np.nanquantile(np.stack(list(images["sqnr_db"].values())), [0.01, 0.99])
    styles = {
        "sqnr_db": {"cmap": "viridis", "vmin": levels[0], "vmax": max(levels[1], levels[0] + 1e-3)},
        "gain": {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1.0, 1 - spread, 1 + spread)},
    }
    columns, lines = min(len(found), PANELS), -(-len(found) // PANELS)
    with styled():
        left, panel = 0.075 * max(map(len, sites)) + 0.15, 0.15 * len(sites)
        width, height = left + 2.2 * columns + 1.1, 2 * lines * (panel + 0.56) + 0.5
        figure = new_figure_with_margins(width, height, left, right=1.1, top=0.46, bottom=0.5)
        spacing = {"wspace": 0.06, "hspace": 0.56 / panel}
        grid = figure.subplots(2 * lines, columns, squeeze=False, sharex=True, sharey=True, gridspec_kw=spacing)
        for axis in grid.flat:
            axis.axis("off")
        for kind, (quantity, label) in enumerate((("sqnr_db", "SQNR, dB"), ("gain", "gain"))):
            for place, (setting, image) in enumerate(images[quantity].items()):
                axis = grid[lines * kind + place // PANELS, place % PANELS]
                axis.axis("on")
                mesh = axis.imshow(image, aspect="auto", interpolation="nearest", **styles[quantity])
                axis.set_title(f"{title_of(setting)}: {label}", fontsize=8)
                axis.set_yticks(range(len(sites)), sites, fontsize=6.5)
                axis.set_xticks([0, COLUMNS // 2, COLUMNS - 1], ["0", "½", "1"])
                axis.tick_params(length=0, labelleft=place % PANELS == 0, labelbottom=True)
                axis.grid(visible=False)
                axis.spines[:].set_visible(False)
            top = grid[lines * kind, 0].get_position().y1
            tall = min(lines * (panel + 0.56) - 0.4, 2.2) / height
            bar = figure.colorbar(
                mesh, cax=figure.add_axes(((width - 0.95) / width, top - tall, 0.13 / width, tall)), extend="both"
            )
            bar.set_label(label)
            bar.outline.set_edgecolor(LIGHT)  # type: ignore[operator]
        figure.supxlabel("relative rank (0: largest)", y=0.08 / height, fontsize=9)
    return figure


def _relative(curve: SiteCurve, quantity: str) -> NDArray[np.float64]:
    values = getattr(curve, quantity)
    values = np.where(np.isfinite(values), values, np.nan)
    return np.interp(np.linspace(0, 1, COLUMNS), np.linspace(0, 1, len(values)), values)
