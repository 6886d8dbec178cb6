"""What figures share: sizes, colours, legends.

Colours are safe for the common kinds of colour blindness: Okabe & Ito's (2008) palette, viridis and the red-blue
diverging map. Line style or position repeats what colour says.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

BLACK, GREY, LIGHT = "#1f2430", "#6b7280", "#d9dce3"
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
DASHED = (0, (3, 2))


DPI = 90


plain_text = matplotlib.rc_context({"text.parse_math": False})
"""Decorator of what draws a figure: names may hold dollar signs, which are no formulas."""


PANELS_PER_ROW = 4


FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def draw_legend(figure: Figure, handles: Sequence[Artist], top: float) -> None:
    """A legend in one line, centred, its upper edge at ``top`` (figure coordinates)."""
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, top), ncols=len(handles), fontsize=7.5, frameon=False
    )
