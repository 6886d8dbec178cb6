"""Figures of what quantization does to activations, rank by rank and block by block."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullFormatter
from numpy.typing import NDArray

from lightning_vlmq.plotting.base import BLACK, DPI, GREY, draw_legend, plain_text
from lightning_vlmq.spectral import RankTable

COLUMNS = 64


@plain_text
def rank_curves(tables: Mapping[str, RankTable], title: str) -> Figure:
    """SQNR and gain over rank, a line per site, first to last from dark to light, the output black.

    Gains are pooled over ranks a factor of the square root of 2 wide, as one rank's is mostly noise; bars are two standard
    errors, and a gain whose bar holds 1 shows no damping.

    Args:
        tables: by site, at least one with a rank, in the order of depth.
        title: of the figure.
    """
    drawn = {site: table for site, table in tables.items() if len(table)}
    figure = Figure(figsize=(8.4, 3.3), dpi=DPI)
    height = 3.3
    panels = [figure.add_axes((left, 0.47 / height, 0.405, 2.25 / height)) for left in (0.075, 0.57)]
    colours = [colormaps["viridis"](x) for x in np.linspace(0.0, 0.85, max(len(drawn), 2))]
    gains: list[NDArray[np.float64]] = []
    for colour, (site, table) in zip(colours, drawn.items()):
        line: dict[str, Any] = {"color": BLACK if site.endswith("output") else colour, "linewidth": 1.2}
        sqnr = table.sqnr_db.cpu().numpy()
        panels[0].plot(np.arange(1, len(table) + 1), np.where(np.isfinite(sqnr), sqnr, np.nan), **line)
        edges = rank_windows(len(table))
        pooled = np.array([table.pooled(start, stop) for start, stop in pairwise(edges)])
        middle = np.sqrt((edges[:-1] + 1.0) * edges[1:])
        panels[1].errorbar(middle, pooled[:, 1], 2 * pooled[:, 2], **line, elinewidth=0.7)
        gains.append(pooled[:, 1])
    panels[1].axhline(1, color=GREY, linewidth=0.8)
    low, high = np.quantile(np.concatenate(gains), [0.02, 0.98])  # ranks without energy must not flatten the rest
    margin = 0.1 * max(high - low, 1e-3)
    panels[1].set_ylim(min(low, 1) - margin, max(high, 1) + margin)
    for axes, label in zip(panels, ("SQNR, dB", "gain (1: not damped)")):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(label, fontsize=8.5)
        axes.set_xlabel("rank on full precision's basis", fontsize=8.5)
        axes.tick_params(labelsize=7.5)
    figure.text(0.5, 1 - 0.08 / height, title, fontsize=10, ha="center", va="top")
    blocks = [site for site in drawn if not site.endswith("output")]
    handles = [
        Line2D([], [], color=colours[k], label=site) for k, site in enumerate(blocks) if k in (0, len(blocks) - 1)
    ]
    handles += [Line2D([], [], color=BLACK, label=site) for site in drawn if site.endswith("output")]
    draw_legend(figure, handles, 1 - 0.27 / height)
    return figure


def rank_windows(n: int) -> NDArray[np.intp]:
    """Edges of windows of ranks a factor of the square root of 2 wide, 0-based: 1, 1, 1, 1, 2, 2, 3, 5, ... ranks, the last one shorter."""
    edges = np.unique(np.round(2 ** np.arange(0, 2 * np.log2(max(n, 2)) + 1, 0.5)).astype(np.intp))
    return np.concatenate([[0], edges[edges < n], [n]])


@plain_text
def rank_maps(tables: Mapping[str, RankTable], title: str) -> Figure:
    """Site by relative rank: SQNR and gain as colours, each with its own bar.

    Args:
        tables: by site, at least one with a rank, in the order of depth.
        title: of the figure.
    """
    drawn = {site: table for site, table in tables.items() if len(table)}
    height = 0.19 * len(drawn) + 1.15
    figure = Figure(figsize=(8.4, height), dpi=DPI)
    bottom, span = 0.55 / height, 1 - 0.95 / height
    images = [
        np.stack([_relative(getattr(t, name).cpu().numpy()) for t in drawn.values()]) for name in ("sqnr_db", "gain")
    ]
    spread = max(float(np.nanquantile(np.abs(images[1] - 1), 0.98)), 1e-3)
    styles: list[dict[str, Any]] = [
        {"cmap": "viridis"},
        {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1.0, 1 - spread, 1 + spread)},
    ]
    for k, (image, style, label) in enumerate(zip(images, styles, ("SQNR, dB", "gain"))):
        left = 0.15 + 0.43 * k
        axes = figure.add_axes((left, bottom, 0.32, span))
        mesh = axes.imshow(image, aspect="auto", interpolation="nearest", **style)
        axes.set_xticks(np.linspace(0, COLUMNS - 1, 3), ["0", "½", "1"], fontsize=7.5)
        axes.set_yticks(range(len(drawn)), list(drawn) if k == 0 else [], fontsize=7)
        axes.tick_params(length=2)
        axes.set_xlabel("relative rank (0: largest)", fontsize=8)
        bar = figure.colorbar(
            mesh, cax=figure.add_axes((left + 0.33, bottom, 0.014, span)), extend="both" if k else "neither"
        )
        bar.ax.set_title(label, fontsize=7.5)
        bar.ax.tick_params(labelsize=7)
    figure.text(0.5, 1 - 0.07 / height, title, fontsize=10, ha="center", va="top")
    return figure


def _relative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.where(np.isfinite(values), values, np.nan)
    return np.interp(np.linspace(0, 1, COLUMNS), np.linspace(0, 1, len(values)), values)
