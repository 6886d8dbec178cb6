"""Clip ranges at a percentile of the values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.fake_quant import to_blocks
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.observers import observe_histograms
from lightning_vlmq.quant.scheme import QuantScheme

SHARE = 0.9999


@METHODS.register("percentile")
class Percentile(PTQMethod):
    """Ranges leave out the rarest values on either side (Wu et al. 2020, arXiv 2004.09602, "Calibration").

    Activations and weights are clipped at their 0.01 % and 99.99 % quantiles, one of the shares that the paper
    compares; activations by a 4096-bin histogram over all calibration batches, weights exactly, block by block
    with linear interpolation (so a block of a few hundred weights loses a little of its extreme value). What the clipped
    values lose, all others gain: their step is that much smaller. torchao has no such observer.
    """

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix activation grids between two quantiles of each layer's input."""
        layers = static_layers(vlm)
        for name, histogram in observe_histograms(vlm, scheme, calibration).items():
            ends = torch.tensor([[histogram.quantile(1 - SHARE)], [histogram.quantile(SHARE)]])
            layers[name].act_fake_quant.set_range(ends[0], ends[1])

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's weight grid between two quantiles of each block."""
        quantizer = layer.weight_fake_quant
        blocks = to_blocks(layer.weight, quantizer.granularity)
        rows = blocks.reshape(1, -1) if isinstance(quantizer.granularity, PerTensor) else blocks
        quantizer.set_range(_quantile(rows, 1 - SHARE), _quantile(rows, SHARE))


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Quantile of each row with linear interpolation; ``torch.quantile`` refuses rows of more than 2^24 values."""
    ordered = rows.sort(dim=1).values
    place = share * (rows.shape[1] - 1)
    below = int(place)
    return torch.lerp(ordered[:, below], ordered[:, min(below + 1, rows.shape[1] - 1)], place - below)
