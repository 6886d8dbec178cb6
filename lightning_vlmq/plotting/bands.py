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


@plain_text
def band_bars(found: Sequence[BandAccuracy]) -> Figure:
    """One site: a panel a mode, a group of bars a band; ticks across them are random subspaces of the band's energy.

    Args:
        found: at least one, all of one site.
    """
    by = {(one.model, one.basis, one.mode, one.band): one.top1 for one in found}
    bands = list(dict.fromkeys(one.band for one in found))
    figure = Figure(figsize=(8.4, 2.9), dpi=DPI)
    figure.subplots_adjust(left=0.07, right=0.99, top=0.73, bottom=0.16, wspace=0.08)
    panels = figure.subplots(1, len(MODES), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, MODES):
        for offset, ((model, basis), (_, colour)) in enumerate(BARS.items()):
            places = [k + 0.26 * (offset - 1) for k in range(len(bands))]
            axes.bar(places, [100 * by.get((model, basis, mode, band), 0.0) for band in bands], 0.24, color=colour)
            if mode == "keep" and basis == OWN[model]:
                random = [100 * by.get((model, "random", mode, band), float("nan")) for band in bands]
                axes.hlines(random, [p - 0.12 for p in places], [p + 0.12 for p in places], color=BLACK, linewidth=1.6)
        axes.set_xticks(range(len(bands)), bands, fontsize=8)
        axes.set_title(TITLES[mode], fontsize=9, pad=4)
        axes.tick_params(labelsize=7.5, length=2)
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("top-1 accuracy, %", fontsize=8.5)
    figure.supxlabel("ranks", fontsize=8.5, y=0.01)
    figure.text(
        0.5, 0.985, f"{found[0].site}: accuracy by ranks, {found[0].n:,} images", fontsize=10, ha="center", va="top"
    )
    handles = [Patch(color=colour, label=label) for label, colour in BARS.values()]
    handles += [Patch(color=BLACK, label="random subspace, same energy")]
    draw_legend(figure, handles, 0.92)
    return figure
