"""What the report's figures share: colours, markers, axes, and how they become SVG or PNG.

Colours are Okabe & Ito's (2008) and, beyond them, Tol's (2021), safe for the common kinds of colour blindness; marker or line
style repeats what they say.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.plotting.base import BLACK, BLUE, GREEN, GREY, LIGHT, PURPLE, VERMILION
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.study.analysis.setting import Setting

PALETTE = (BLUE, VERMILION, GREEN, PURPLE, "#E69F00", "#56B4E9", "#8C6D31", "#332288", "#999933", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": BLACK,
    "ytick.labelcolor": BLACK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": BLACK,
    "svg.fonttype": "path",
    "text.parse_math": False,  # names may hold dollar signs
    "svg.hashsalt": "lightning_vlmq",
}


def styled() -> AbstractContextManager[None]:
    """Context under which a figure is built and saved in the report's style."""
    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches with automatic layout, independent of pyplot's state."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width, height), layout=layout)


def new_figure_with_margins(
    width: float, height: float, left: float, right: float, top: float, bottom: float
) -> Figure:
    """A figure whose margins are given, all in inches: drawn in half the time that finding the layout takes."""
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def panel_grid(
    blocks: Sequence[str], vlms: Sequence[str], height: float, x_label: str, y_label: str
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Panels that share their axes: one per VLM for every block (a method, a scope), in lines of up to five.

    Args:
        blocks: what is written beside the lines.
        vlms: what is written above the panels.
        height: of a panel in inches, with its title.
        x_label: what is below all panels.
        y_label: what is beside every line, after the block.

    Returns:
        The figure, with room for a legend at the bottom, and the panels by block and VLM.
    """
    columns = min(len(vlms), 5)
    lines_each = -(-len(vlms) // columns)
    lines, panel_width = lines_each * len(blocks), max(2.14, 6 / columns)
    width, margins = panel_width * columns + 0.85, {"left": 0.7, "right": 0.15, "top": 0.3, "bottom": 1.0}
    figure = new_figure_with_margins(width, height * lines + 1.1, **margins)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(wspace=0.16, hspace=0.34 / (height - 0.34))
    panels = {}
    for line, axes in enumerate(grid):
        block, first = blocks[line // lines_each], line % lines_each * columns
        own = vlms[first : first + columns]
        axes[0].set_ylabel(f"{block}\n{y_label}")
        for axis, vlm in zip(axes, own):
            axis.set_title(vlm, fontsize=9)
            panels[block, vlm] = axis
        for axis in axes[len(own) :]:
            axis.axis("off")
    label_last_line(grid)
    figure.supxlabel(x_label, y=0.45 / figure.get_figheight(), fontsize=9)
    return figure, panels


def label_last_line(grid: Any) -> None:
    """Write the shared x axis' numbers below the last panel of each column of ``[lines, columns]`` axes, some of which are off."""
    for column in grid.T:
        used = [axis for axis in column if axis.axison]
        for axis in used:
            axis.tick_params(labelbottom=axis is used[-1])


def as_svg(figure: Figure) -> str:
    """The figure as an SVG document, the same bytes for the same figure."""
    buffer = io.StringIO()
    with styled():
        # savefig would draw the figure twice more to find its layout, which takes most of a report's time.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def as_html(figure: Figure | None, alternative: str, caption: str) -> str:
    """The figure with a description and a caption (HTML), to stand in a page; nothing where there is none."""
    if figure is None:
        return ""
    # As an image, not inline: identifiers inside one figure's SVG must not meet those of another.
    data = base64.b64encode(as_svg(figure).encode()).decode()
    width = round(100 * figure.get_figwidth())  # pixels at which the smallest labels read well
    least = min(width, 720) if width < 1400 else round(0.8 * width)  # what is wider than the page is scrolled
    style = f"width:{width}px;min-width:{least}px"
    image = f"<img alt='{escape(alternative, quote=True)}' style='{style}' src='data:image/svg+xml;base64,{data}'>"
    return f"<figure><div class='scroll'>{image}</div><figcaption>{caption}</figcaption></figure>"


def as_png(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write the figure as PNG on white ground."""
    with styled(), replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, facecolor="white")


def vlm_styles(vlms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each VLM."""
    return {vlm: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, vlm in enumerate(vlms)}


def vlm_keys(vlms: Sequence[str], **look: Any) -> list[Line2D]:
    """A legend's entries for VLMs; ``look`` are further properties of the lines."""
    return [
        Line2D([], [], color=colour, marker=marker, markersize=5, label=vlm, **look)
        for vlm, (colour, marker) in vlm_styles(vlms).items()
    ]


def significance_keys() -> list[Line2D]:
    """A legend's entries for filled and hollow marks."""
    look: dict[str, Any] = {"color": GREY, "marker": "o", "linestyle": ""}
    return [
        Line2D([], [], **look, label="significant"),
        Line2D([], [], **look, markerfacecolor="white", label="not significant"),
    ]


def method_colours(settings: Sequence[Setting]) -> dict[str, str]:
    """Colour of each method: cold for post-training quantization, warm for trained methods."""
    methods = list(dict.fromkeys(setting.method for setting in settings))
    trained = [name for name in methods if name in METHODS and METHODS[name].needs_training]
    colours = {}
    for members, single, scale in (
        ([name for name in methods if name not in trained], BLUE, colormaps["winter"]),
        (trained, VERMILION, colormaps["autumn"]),
    ):
        span = max(len(members) - 1, 1)
        for i, name in enumerate(members):
            colours[name] = single if len(members) == 1 else to_hex(scale(0.05 + 0.75 * i / span))
    return colours


def bits_styles(settings: Sequence[Setting]) -> dict[str, str]:
    """Colour of each pair of bit-widths, many bits first."""
    names = list(dict.fromkeys(s.bits for s in sorted(settings, key=lambda s: (-s.weight_bits, -s.act_bits))))
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def scope_dashes(settings: Sequence[Setting]) -> dict[str, Any]:
    """Line style of each scope."""
    names = list(dict.fromkeys(setting.scope for setting in settings))
    return {name: DASHES[i % len(DASHES)] for i, name in enumerate(names)}


def in_percent(axis: Axes, which: str, signed: bool = False) -> None:
    """Label an axis of fractions in percent."""

    def write(value: float, _position: int) -> str:
        number = f"{100 * value:+.10g}" if signed and abs(value) > 1e-9 else f"{100 * value:.10g}"
        return number.replace("-", "−")

    (axis.xaxis if which == "x" else axis.yaxis).set_major_formatter(FuncFormatter(write))
