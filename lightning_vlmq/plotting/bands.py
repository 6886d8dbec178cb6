"""Accuracy inside bands of ranks, as bars: which of them carry it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_vlmq.evaluation.band_accuracy import BandAccuracy
from lightning_vlmq.plotting.base import BLACK, BLUE, DPI, GREY, LIGHT, VERMILION, draw_legend, plain_text
from lightning_vlmq.spectral import MODES

TITLES = {"keep": "the band alone", "drop": "all but the band", "cumulative": "all up to the band's end"}


BARS = {
    ("full", "full"): ("FP32", GREY),
    ("quantized", "full"): ("quantized, FP32's basis", BLUE),
    ("quantized", "own"): ("quantized, own basis", VERMILION),
}

OWN = {"full": "full", "quantized": "own"}
"""Each model's own basis."""


CENTRE_TITLES = {"mean": "others at their mean", "zero": "others at zero"}


@plain_text
def band_bars(found: Sequence[BandAccuracy]) -> Figure:
    """One site: a row a centre, a panel a mode, a group of bars a band; ticks across them are random subspaces of the band's energy.

    Args:
        found: at least one, all of one site.
    """
    by = {(one.around, one.model, one.basis, one.mode, one.band): one.top1 for one in found}
    bands = list(dict.fromkeys(one.band for one in found))
    centres = list(dict.fromkeys(one.around for one in found))
    height = 0.9 + 2.0 * len(centres)
    figure = Figure(figsize=(8.4, height), dpi=DPI)
    spacing = {"left": 0.07, "right": 0.99, "wspace": 0.08, "hspace": 0.32}
    figure.subplots_adjust(top=1 - 0.78 / height, bottom=0.46 / height, **spacing)
    grid = figure.subplots(len(centres), len(MODES), sharey=True, squeeze=False)
    for panels, around in zip(grid, centres):
        for axes, mode in zip(panels, MODES):
            for offset, ((model, basis), (_, colour)) in enumerate(BARS.items()):
                places = [k + 0.26 * (offset - 1) for k in range(len(bands))]
                heights = [100 * by.get((around, model, basis, mode, band), 0.0) for band in bands]
                axes.bar(places, heights, 0.24, color=colour)
                if mode == "keep" and basis == OWN[model]:
                    random = [100 * by.get((around, model, "random", mode, band), float("nan")) for band in bands]
                    ends = [p - 0.12 for p in places], [p + 0.12 for p in places]
                    axes.hlines(random, *ends, color=BLACK, linewidth=1.6)
            axes.set_xticks(range(len(bands)), bands, fontsize=8)
            axes.set_title(f"{TITLES[mode]}, {CENTRE_TITLES[around]}", fontsize=8.5, pad=4)
            axes.tick_params(labelsize=7.5, length=2)
            axes.grid(axis="y", color=LIGHT, linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("top-1 accuracy, %", fontsize=8.5)
    figure.supxlabel("ranks", fontsize=8.5, y=0.03 / height)
    title = f"{found[0].site}: accuracy by ranks, {found[0].n:,} images"
    figure.text(0.5, 1 - 0.05 / height, title, fontsize=10, ha="center", va="top")
    handles = [Patch(color=colour, label=label) for label, colour in BARS.values()]
    handles += [Patch(color=BLACK, label="random subspace, same energy")]
    draw_legend(figure, handles, 1 - 0.24 / height)
    return figure
