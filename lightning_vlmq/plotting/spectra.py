"""Figures of the callbacks, drawn on ``Figure`` objects alone: no pyplot, no global state, nothing left open.

Colours are safe for the common kinds of colour blindness: Okabe & Ito's (2008) palette, viridis and the red-blue
diverging map. Line style or position repeats what colour says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from lightning_vlmq.plotting.base import DASHED, DPI, GREY, PANELS_PER_ROW, draw_legend, plain_text
from lightning_vlmq.spectral import LayerSpectrum, Spectrum

HEATMAP_COLUMNS = 64
UNROLLED = "of convolutions: of the unrolled kernel matrix"
"""What the singular values of a convolution are; said wherever they are shown."""
_CONTAINERS = {"model", "visual", "text", "transformer", "trunk", "resblocks", "encoder", "stages", "blocks", "layers"}


def short_layer_name(name: str) -> str:
    """Leave out the parts of a layer's name that only say which container it sits in.

    ``"model.visual.transformer.resblocks.0.attn.q_proj"`` becomes ``"0.attn.q_proj"``.
    """
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part not in _CONTAINERS), parts[-1]])


def has_convolutions(groups: Iterable[str]) -> bool:
    """Whether layers of a convolution's group, ``<tower>/conv``, are among those of these groups."""
    return any(group.endswith("/conv") for group in groups)


def _role(name: str) -> str:
    """A layer's name without its position in depth: layers of one role share a panel."""
    return ".".join(part for part in short_layer_name(name).split(".") if not part.isdigit())


@plain_text
def singular_value_curves(layers: Sequence[LayerSpectrum], title: str, label: str, reference_label: str) -> Figure:
    """Singular values over rank: one panel per layer role, one line per layer, the reference dashed.

    Args:
        layers: of one group, at least one, in the order of depth.
        title: of the figure.
        label: what the solid lines are, e.g. ``"quantized"``.
        reference_label: what the dashed lines are, e.g. ``"FP32"``.
    """
    roles: dict[str, list[LayerSpectrum]] = {}
    for layer in layers:
        roles.setdefault(_role(layer.name), []).append(layer)
    panels = list(roles.items())
    n_columns = min(len(panels), PANELS_PER_ROW)
    n_rows = math.ceil(len(panels) / n_columns)
    width, height = max(2.2 * n_columns + 0.7, 4.6), 2.2 * n_rows + 0.75
    figure = Figure(figsize=(width, height), dpi=DPI)
    for row in range(n_rows):
        members = panels[row * n_columns : (row + 1) * n_columns]
        bottom = (0.42 + 2.2 * (n_rows - 1 - row)) / height
        share = len(members) / n_columns
        _curve_row(figure.add_axes((0.6 / width, bottom, (1 - 0.7 / width) * share, 1.6 / height)), members)
    of_what = " of the unrolled kernel matrix" if has_convolutions(layer.group for layer in layers) else ""
    figure.text(0.5, 0.05 / height, f"rank{of_what}", fontsize=8.5, ha="center", va="bottom")
    figure.text(0.06 / width, 0.5, "singular value σ", fontsize=8.5, ha="left", va="center", rotation=90)
    figure.text(0.5, 1 - 0.08 / height, title, fontsize=10, ha="center", va="top")
    handles = [Line2D([], [], color=GREY, label=label)]
    if any(layer.reference is not None for layer in layers):
        handles.append(Line2D([], [], color=GREY, linestyle=DASHED, label=reference_label))
    if (depth := max(len(members) for members in roles.values())) > 1:
        first, *_, last = _depth_colors(depth)
        handles += [
            Line2D([], [], color=first, marker="s", linestyle="", label="first layer"),
            Line2D([], [], color=last, marker="s", linestyle="", label="last layer"),
        ]
    draw_legend(figure, handles, 1 - 0.24 / height)
    return figure


def _curve_row(axes: Axes, panels: Sequence[tuple[str, Sequence[LayerSpectrum]]]) -> None:
    # All panels of a row share one matplotlib axes, line collections and fixed ticks: these figures are drawn in every
    # validation, and matplotlib's own subplots take several times as long.
    solid: list[np.ndarray] = []
    dashed: list[np.ndarray] = []
    solid_colors: list[tuple[float, ...]] = []
    dashed_colors: list[tuple[float, ...]] = []
    ticks: dict[float, str] = {}
    for left, (role, layers) in enumerate(panels):
        n_ranks = max(len(layer.spectrum) for layer in layers)
        first, last = left + 0.04, left + 0.96
        ticks |= {first: "1", last: str(n_ranks)} if n_ranks > 1 else {first: "1"}
        axes.text(left + 0.5, 1.03, role, fontsize=8.5, ha="center", va="bottom", transform=axes.get_xaxis_transform())
        for color, layer in zip(_depth_colors(len(layers)), layers, strict=True):
            solid.append(_points(layer.spectrum, first, last, n_ranks))
            solid_colors.append(color)
            if layer.reference is not None:
                dashed.append(_points(layer.reference, first, last, n_ranks))
                dashed_colors.append(color)
    axes.add_collection(LineCollection(solid, colors=solid_colors, linewidths=1.2), autolim=False)
    axes.add_collection(
        LineCollection(dashed, colors=dashed_colors, linewidths=1.2, linestyles=[DASHED]), autolim=False
    )
    axes.vlines(range(1, len(panels)), 0, 1, transform=axes.get_xaxis_transform(), color="black", linewidth=0.8)
    axes.set_xlim(0, len(panels))
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.tick_params(labelsize=7, length=2, pad=2)
    values = np.concatenate([*solid, *dashed])[:, 1]
    if (largest := float(values.max())) > 0:
        low, high = float(values[values > 1e-3 * largest].min()) / 1.2, largest * 1.2  # smaller ones leave the panel
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def _points(spectrum: Spectrum, first: float, last: float, n_ranks: int) -> np.ndarray:
    values = spectrum.singular_values.numpy()
    if len(values) == 1:
        return np.array([[first, values[0]], [first + 0.05, values[0]]])  # a dash: a single point would be invisible
    return np.column_stack([first + (last - first) * np.arange(len(values)) / (n_ranks - 1), values])


def _depth_colors(n: int) -> list[tuple[float, float, float, float]]:
    return [colormaps["viridis"](x) for x in np.linspace(0.0, 0.85, n)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside the limits; with fewer than three of them also their 2- and 5-fold."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    return ticks


@plain_text
def log_ratio_heatmap(layers: Sequence[LayerSpectrum], title: str, label: str, reference_label: str) -> Figure:
    """Layer by rank: how many octaves each singular value grew (red) or shrank (blue) against its reference.

    The rank axis is relative, 0 for the largest and 1 for the smallest singular value, so that layers of all sizes
    share it. The colour range covers 98 % of the values; the colour bar's arrows say that some lie outside.

    Args:
        layers: at least one, all with a reference.
        title: of the figure.
        label: numerator of the ratio, e.g. ``"quantized"``.
        reference_label: its denominator, e.g. ``"FP32"``.
    """
    layers = sorted(layers, key=lambda layer: layer.group)  # stable: the order of depth stays inside a group
    grid = np.linspace(0, 1, HEATMAP_COLUMNS)
    rows = []
    for layer in layers:
        ratio = layer.log_ratio().numpy()
        rows.append(np.interp(grid, np.linspace(0, 1, len(ratio)), ratio))
    image = np.stack(rows)
    limit = max(float(np.quantile(np.abs(image), 0.98)), 1e-3)
    height = 0.15 * len(layers) + 1.1
    figure = Figure(figsize=(8, height), dpi=DPI)
    bottom, top = 0.5 / height, 1 - 0.35 / height
    axes = figure.add_axes((0.3, bottom, 0.59, top - bottom))
    mesh = axes.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.linspace(0, HEATMAP_COLUMNS - 1, 5), ["0", "0.25", "0.5", "0.75", "1"], fontsize=7)
    axes.set_yticks([])
    axes.tick_params(length=2)
    ranks = "relative rank (0: largest σ, 1: smallest σ)"
    if has_convolutions(layer.group for layer in layers):
        ranks += f"; {UNROLLED}"
    figure.text(0.595, 0.06 / height, ranks, fontsize=8, ha="center", va="bottom")
    quantity = (
        f"log2(σ {label} / σ {reference_label})"  # here, not along the bar: a model of few layers has a short one
    )
    figure.text(0.5, 1 - 0.08 / height, f"{title}: {quantity}", fontsize=10, ha="center", va="top")
    beside = axes.get_yaxis_transform()
    row = 0
    for group, members in groupby(layers, key=lambda layer: layer.group):
        first = row
        for layer in members:
            axes.text(
                -0.015, row, short_layer_name(layer.name), transform=beside, fontsize=6.5, ha="right", va="center"
            )
            row += 1
        axes.text(-0.5, (first + row - 1) / 2, group, transform=beside, fontsize=7.5, va="center", weight="bold")
        if first:
            axes.axhline(first - 0.5, xmin=-0.5, color="black", linewidth=0.8, clip_on=False)
    bar = figure.colorbar(mesh, cax=figure.add_axes((0.905, bottom, 0.018, top - bottom)), extend="both")
    bar.ax.tick_params(labelsize=7)
    return figure
