"""Clip ranges that minimise the squared quantization error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers
from lightning_vlmq.quant.methods import PTQMethod, register
from lightning_vlmq.quant.observers import HistogramObserver, observe_histograms
from lightning_vlmq.quant.rounding import block_range, to_blocks
from lightning_vlmq.quant.scheme import QuantScheme

FRACTIONS = torch.linspace(1.0, 0.02, 99).tolist()
"""Candidate ranges, as fractions of the full one; the full one comes first, so no result is worse than min-max."""


@register("mse")
@dataclass(frozen=True)
class MSE(PTQMethod):
    """Ranges that minimise ``||V - V_hat||_F^2`` (Nagel et al. 2021, arXiv 2106.08295, section 3.1), by grid search.

    Weights: both ends of each block shrink together. Activations: the error is taken over a 4096-bin histogram of all
    calibration batches; both ends shrink together first, then each end by itself. torchao's MSE observer is not used,
    as it judges by the latest batch alone.
    """

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix activation grids by search on each layer's histogram."""
        layers = static_layers(vlm)
        for name, histogram in observe_histograms(vlm, scheme, calibration).items():
            quantizer = layers[name].act_fake_quant
            quantizer.set_range(*search_histogram(histogram, quantizer))

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's weight grid by search on each block."""
        quantizer = layer.weight_fake_quant
        blocks = to_blocks(layer.weight, quantizer.granularity)
        quantizer.set_range(*search_blocks(blocks, quantizer))


def search_blocks(blocks: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """The range of each block, among :data:`FRACTIONS` of its full one, with the least squared error.

    Args:
        blocks: from :func:`to_blocks`.
        quantizer: its grid and granularity are used, not its range.

    Returns:
        Minimum and maximum, ``[blocks]`` each.
    """
    whole = isinstance(quantizer.granularity, PerTensor)
    low, high = block_range(blocks, quantizer.granularity)
    best_error = torch.full_like(low, torch.inf)
    best_fraction = torch.ones_like(low)
    for fraction in FRACTIONS:
        error = (quantizer.round_within(blocks, low * fraction, high * fraction) - blocks).square()
        error = error.sum().view(1) if whole else error.sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_fraction = torch.where(better, fraction, best_fraction)
    return low * best_fraction, high * best_fraction


def search_histogram(histogram: HistogramObserver, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """The range, within the histogram's, with the least squared error over its counts; two ``[1]`` tensors."""
    fractions = torch.tensor(FRACTIONS, dtype=torch.float64)[:, None]
    low = torch.full_like(fractions, histogram.minimum)
    high = torch.full_like(fractions, histogram.maximum)

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        rounded = quantizer.round_within(histogram.centers, lows[:, 0], highs[:, 0])
        index = ((rounded - histogram.centers).square() * histogram.counts).sum(1).argmin()
        return lows[index].expand_as(low), highs[index].expand_as(high)

    low, high = best(low * fractions, high * fractions)
    low, high = best(low * fractions, high)
    low, high = best(low, high * fractions)
    return low[0].float(), high[0].float()
