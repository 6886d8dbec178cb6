"""Low-rank compensation: what rounding loses of a weight, or what it cannot take, is kept in a low-rank term beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer
from lightning_vlmq.quant.methods import PTQMethod, register, within
from lightning_vlmq.quant.observers import second_moments
from lightning_vlmq.quant.rounding import block_range, to_blocks
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.spectral import RankCut, as_matrix

UNQUANTIZED = 32
"""Bits of a number in full precision."""


class Compensated(FakeQuantizer):
    """A weight quantizer with a low-rank term beside it: ``round(W - before) + term``.

    Attributes:
        before: taken from the weight before it is rounded (SVDQuant's leading part), in its shape; zero otherwise.
        term: added to the rounded weight, in its shape, of low rank.
        rank: of the term at most.
    """

    before: Tensor
    term: Tensor
    rank: int
    has_integers = False

    @classmethod
    def of(cls, quantizer: FakeQuantizer, before: Tensor, term: Tensor, rank: int) -> Compensated:
        """From a quantizer whose grid is that of ``W - before``."""
        made = cls.__new__(cls)
        made.__dict__.update(copy.deepcopy(quantizer).__dict__)
        made.register_buffer("before", before)
        made.register_buffer("term", term)
        made.rank = rank
        return made

    @property
    def extra_bits(self) -> int:
        """The two factors of the term, 32 bits per number; no more than the term itself has."""
        matrix = as_matrix(self.term)
        return UNQUANTIZED * min(min(self.rank, *matrix.shape) * sum(matrix.shape), matrix.numel())

    def to_round(self, x: Tensor) -> Tensor:
        """The weight without what is kept in full precision, whose grid this is."""
        return x - self.before

    def forward(self, x: Tensor) -> Tensor:
        """The effective weight, in the shape of ``x``."""
        return super().forward(self.to_round(x)) + self.term if self.enabled else x


@register("lowrank_compensation")
@dataclass(frozen=True)
class LowRankCompensation(PTQMethod):
    """Round-to-nearest with a low-rank term in full precision beside every weight: ``W ~ round(.) + A B``.

    ``A B`` multiplies the same rounded input as the rounded weight does. At rank r it adds ``r (in + out)`` values in full precision to a
    layer, which count in the bits per weight. Depth-wise and grouped convolutions are rounded alone. Ranges are min-max.

    Attributes:
        kind: ``lqer``: the best approximation of the rounding error (Zhang et al. 2024, arXiv 2402.02446, Eq. 6);
            ``qera``: that of the error's output on the calibration data (QERA, Zhang et al. 2025, arXiv 2410.06040,
            Theorem 1; EoRA likewise); ``svdquant``: the leading directions of the weight, taken out before the rest is rounded
            (SVDQuant, Li et al. 2025, arXiv 2411.05007, Eq. 5, without its smoothing).
        rank: of the term; a layer of fewer ranks gets all of them, and is then exact.
    """

    kind: Literal["lqer", "qera", "svdquant"] = "qera"
    rank: int = within(8, 0)

    has_integers = False

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix every layer's grid and term."""
        made = {
            layer: self.compensate(layer, moment[0] if len(moment) == 1 else None)
            for _, layer, moment in second_moments(vlm, scheme, calibration)
        }
        for layer, quantizer in made.items():
            layer.weight_fake_quant = quantizer

    def compensate(self, layer: QuantizedLayer, moment: Tensor | None) -> FakeQuantizer:
        """The quantizer of one layer.

        Args:
            layer: whose weight it is; not changed.
            moment: second moment of its inputs, ``[K, K]``; ``None`` for a grouped convolution.
        """
        quantizer, weight = copy.deepcopy(layer.weight_fake_quant), layer.weight.detach()
        zero = torch.zeros_like(weight)
        before = zero
        if self.kind == "svdquant" and moment is not None:
            before = self._low_rank(weight)
        blocks = to_blocks(weight - before, quantizer.granularity)
        quantizer.set_range(*block_range(blocks, quantizer.granularity))
        if moment is None:
            return quantizer
        if self.kind == "svdquant":
            return Compensated.of(quantizer, before, before, self.rank)
        error = weight - quantizer(weight)
        return Compensated.of(
            quantizer, zero, self._low_rank(error, moment if self.kind == "qera" else None), self.rank
        )

    def _low_rank(self, matrix: Tensor, moment: Tensor | None = None) -> Tensor:
        cut = RankCut(matrix, moment, is_weighted=moment is not None)
        return cut.keep(0, min(self.rank, len(cut)))
