"""What quantization does to the singular values of the weights, by layer group and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter
from numpy.typing import NDArray

from lightning_vlmq.plotting.spectra import short_layer_name
from lightning_vlmq.spectral import log_ratio
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.mechanism import setting_name
from lightning_vlmq.study.analysis.runs import StoredRun
from lightning_vlmq.study.analysis.setting import Setting
from lightning_vlmq.study.report.figures.style import (
    BLACK,
    DASHES,
    GREY,
    LIGHT,
    method_colours,
    new_figure_with_margins,
    styled,
)

RANKS = np.linspace(0, 1, 48)
"""Relative ranks at which layers of all sizes are compared: 0 the largest singular value, 1 the smallest."""


class LayerCurve(NamedTuple):
    """Singular values of one layer's weight, largest first, each ``[r]``.

    Attributes:
        group: the group that the layer is shown with, ``<tower>/<kind>``.
        quantized: of the weight as the quantized model uses it.
        reference: of the full-precision weight.
    """

    group: str
    quantized: NDArray[np.float64]
    reference: NDArray[np.float64]

    def log2_ratio(self) -> NDArray[np.float64]:
        """Octaves that each singular value grew by, at :data:`RANKS`."""
        ratio = log_ratio(torch.tensor(self.quantized), torch.tensor(self.reference)).numpy()
        return np.interp(RANKS, np.linspace(0, 1, len(ratio)), ratio)


Spectra = Mapping[Setting, Mapping[str, LayerCurve]]
"""Singular values by setting and layer name; groups together, vision first, then layers in the model's order."""


def read_spectra(analysis: StudyAnalysis, vlm: str) -> Spectra:
    """Singular values of a VLM in the settings with the fewest weight bits and the widest scope.

    There, changes are largest. With several seeds, the first one's.
    """
    spectra: dict[Setting, dict[str, LayerCurve]] = {}
    for run in harshest_runs(analysis, vlm):
        curves = run.store.curves(run.run_id)
        curves = curves[(curves["kind"] == "singular_values") & curves["y_reference"].notna()]
        if len(curves):
            spectra[run.setting] = _by_layer(curves)
    return spectra


def harshest_runs(analysis: StudyAnalysis, vlm: str) -> list[StoredRun]:
    """The quantized runs of a VLM with the fewest weight bits and, among these, the widest scope; with several seeds, the first one's.

    Controls come last.
    """
    quantized = [
        run for run in analysis.results.runs_of(vlm)[1] if not run.setting.is_tuned and not run.setting.surgery
    ]
    if not quantized:
        return []
    fewest = min(run.key.weight_bits for run in quantized)
    chosen = [run for run in quantized if run.key.weight_bits == fewest]
    widest = max((run.setting for run in chosen), key=lambda setting: setting.sort_key[-1]).scope
    first: dict[tuple[str, Setting | None], StoredRun] = {}
    for run in chosen:
        if run.key.scope == widest:
            first.setdefault((title_of(run.setting), None if run.setting.is_control else run.setting), run)
    return sorted(first.values(), key=lambda run: run.setting.is_control)


def title_of(setting: Setting) -> str:
    """A setting above a panel: method and bits, of a control its options and, on a second line, what it imitates, too."""
    name, _, pattern = setting_name(setting).partition(" for ")
    return f"{name} {setting.bits}" + (f"\nfor {pattern}" if pattern else "")


def _by_layer(curves: pd.DataFrame) -> dict[str, LayerCurve]:
    order = {name: i for i, name in enumerate(dict.fromkeys(curves["layer"]))}
    layers = {}
    for (group, layer), part in curves.groupby(["group", "layer"], observed=True):
        ordered = part.sort_values("x")
        layers[str(layer)] = LayerCurve(str(group), ordered["y"].to_numpy(), ordered["y_reference"].to_numpy())
    return dict(sorted(layers.items(), key=lambda item: (_group_rank(item[1].group), order[item[0]])))


def _group_rank(group: str) -> tuple[int, str]:
    towers = ("vision", "text")
    tower = group.partition("/")[0]
    return (towers.index(tower) if tower in towers else len(towers)), group


def singular_value_ratios(spectra: Spectra) -> Figure | None:
    """Spectra of one VLM by layer group: singular values above, their ratio to full precision's below."""
    if not spectra:
        return None
    first = next(iter(spectra.values()))
    groups = list(dict.fromkeys(layer.group for layer in first.values()))
    colours = method_colours(list(spectra))
    acts = sorted({setting.act_bits for setting in spectra}, reverse=True)
    ratios = []
    with styled():
        width = max(min(2.3 * len(groups), 11), 1.5 * len(groups), 5) + 0.6
        figure = new_figure_with_margins(width, 4.5, left=0.65, right=0.12, top=0.3, bottom=0.82)
        spacing = {"wspace": 0.12, "hspace": 0.12}
        grid = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row", gridspec_kw=spacing)
        for column, group in enumerate(groups):
            upper, lower = grid[:, column]
            lower.axhline(1, color=BLACK, linewidth=1)
            for setting, layers in spectra.items():
                members = [layer for layer in layers.values() if layer.group == group]
                if not members:
                    continue
                line: dict[str, Any] = {"color": colours[setting.method]}
                line["linestyle"] = DASHES[acts.index(setting.act_bits) % len(DASHES)]
                upper.plot(RANKS, np.mean([_profile(m.quantized, m.reference) for m in members], axis=0), **line)
                ratios.append(2 ** np.mean([member.log2_ratio() for member in members], axis=0))
                lower.plot(RANKS, ratios[-1], **line)
            own = [_profile(layer.reference, layer.reference) for layer in first.values() if layer.group == group]
            upper.plot(RANKS, np.mean(own, axis=0), color=BLACK, linestyle=DASHES[2])
            upper.set_title(group, fontsize=9)
            upper.set_yscale("log")
            upper.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            upper.minorticks_off()
            lower.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            lower.set_xlabel("relative rank")
        # Near-zero singular values of a group can change by any factor; they leave the panel rather than flatten it.
        low, high = np.quantile(np.concatenate(ratios), [0.01, 0.99])
        margin = 0.1 * max(high - low, 1e-3)
        grid[1, 0].set_ylim(min(low, 1) - margin, max(high, 1) + margin)
        grid[0, 0].set_ylabel("σ / largest σ of FP32")
        grid[1, 0].set_ylabel("σ / σ of FP32")
        handles = [Line2D([], [], color=BLACK, linestyle=DASHES[2], label="full precision")]
        handles += [Line2D([], [], color=colours[s.method], label=title_of(s).replace("\n", " ")) for s in spectra]
        figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 6))
    return figure


def _profile(values: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    top = reference[0] if reference[0] > 0 else 1.0
    return np.interp(RANKS, np.linspace(0, 1, len(values)), np.maximum(values / top, 1e-6))


def singular_value_heatmaps(spectra: Spectra) -> Figure | None:
    """Layer by rank: how many octaves each singular value grew (red) or shrank (blue); one panel per setting."""
    if not spectra:
        return None
    layers, images, absent = next(iter(spectra.values())), {}, np.full(len(RANKS), np.nan)
    for setting, own in spectra.items():
        images[setting] = np.stack([own[name].log2_ratio() if name in own else absent for name in layers])
    limit = max(float(np.nanquantile(np.abs(np.stack(list(images.values()))), 0.98)), 1e-3)
    columns = min(len(images), 4)
    lines = -(-len(images) // columns)
    with styled():
        labels = [short_layer_name(name) for name in layers]
        left, panel = 0.075 * max(map(len, labels)) + 0.15, 0.135 * len(layers)
        width, height = left + 2.4 * columns + 1.1, lines * (panel + 0.42) + 0.6
        figure = new_figure_with_margins(width, height, left, right=1.1, top=0.4, bottom=0.5)
        spacing = {"wspace": 0.06, "hspace": 0.42 / panel}
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True, gridspec_kw=spacing)
        for axis, (setting, image) in zip(grid.flat, images.items()):
            mesh = axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axis.set_title(title_of(setting), fontsize=8.5)
            axis.set_yticks(range(len(layers)), labels, fontsize=6.5)
            axis.set_xticks([0, len(RANKS) // 2, len(RANKS) - 1], ["0", "½", "1"])
            axis.tick_params(length=0)
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
            groups = [layer.group for layer in layers.values()]
            for y, group in enumerate(groups):
                if y == 0 or group != groups[y - 1]:
                    axis.axhline(y - 0.5, color=GREY, linewidth=0.8)
                    axis.text(0, y - 0.25, group, fontsize=6.5, weight="bold", color=GREY, va="top")
        for axis in grid.flat[len(images) :]:
            axis.axis("off")
        for axis in grid[-1]:
            axis.set_xlabel("relative rank")
        place = ((width - 0.95) / width, 0.6 / height, 0.13 / width, min(panel, 2.6) / height)
        bar = figure.colorbar(mesh, cax=figure.add_axes(place), extend="both")
        bar.set_label("log₂ (σ quantized / σ FP32)")
        bar.outline.set_edgecolor(LIGHT)  # type: ignore[operator]
    return figure
