"""Round to nearest with min-max ranges ("simple PTQ")."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.quant.methods import PTQMethod, register


@register("minmax")
@dataclass(frozen=True)
class MinMax(PTQMethod):
    """Every range spans the smallest and largest value seen; nothing is clipped and everything rounds to nearest.

    Jacob et al. 2018 (arXiv 1712.05877), Eq. 1 with the ranges of section 3.1, which hold zero: the baseline that the
    other methods are held against. Activation ranges are those of all calibration batches, without the moving average.
    torchao makes the grids from the ranges; its observer keeps ranges alone, without the mean that LSQ starts from.
    """
