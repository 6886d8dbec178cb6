"""A published claim beside a study's own figure, and the verdict that follows from where the figure's interval lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_vlmq.statistics import ClusteredMean

Expectation = Literal["rises", "falls", "stays", "some", "almost all"] | float | None
"""What is published: a direction, no significant change, that it happens at all, a share of nearly one, about this share; or nothing
that a figure here could agree with."""

NEGLIGIBLE = 0.01
"""A change within which the published "not significant" counts as met; less than every published change that counts as one."""
ABOUT = 0.1
"""How far from a share "about" it reaches."""
ALMOST_ALL = 0.8
"""The least share that is "almost all"."""

_ABOVE_ZERO = math.ulp(0.0)
_REGIONS: Mapping[str, tuple[float, float]] = {
    "rises": (_ABOVE_ZERO, math.inf),
    "falls": (-math.inf, -_ABOVE_ZERO),
    "stays": (-NEGLIGIBLE, NEGLIGIBLE),
    "some": (_ABOVE_ZERO, math.inf),
    "almost all": (ALMOST_ALL, math.inf),
}
"""From where to where a figure agrees, both ends included."""


@dataclass(frozen=True)
class Claim:
    """One published claim beside the study's own figure.

    Attributes:
        claim: what is claimed.
        published: the published figure.
        expects: what would agree.
        found: this study's, with a 95 % interval over VLMs and test samples; over samples alone where there is one VLM.
        unit: ``"%"`` or ``"points"``, of hundredths.
        n_cells: VLMs and settings behind it.
        query: which numbers they are.
    """

    claim: str
    published: str
    expects: Expectation
    found: ClusteredMean
    unit: str
    n_cells: int
    query: str

    @property
    def verdict(self) -> str:
        """``"agrees"``, ``"disagrees"`` or ``"undecided"``: by where the interval lies, never by the estimate alone.

        ``"no claim"`` where the figure only stands beside others. A significant change disagrees with "not significant" however small.
        """
        if self.expects is None:
            return "no claim"
        low, high = self.found.low, self.found.high
        if math.isnan(low) or math.isnan(high):
            return "undecided"
        share = self.expects
        lowest, highest = (share - ABOUT, share + ABOUT) if isinstance(share, float) else _REGIONS[share]
        if high < lowest or low > highest or (share == "stays" and (low > 0 or high < 0)):
            return "disagrees"
        return "agrees" if lowest <= low and high <= highest else "undecided"
