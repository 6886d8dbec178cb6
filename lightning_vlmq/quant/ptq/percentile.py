"""Clip ranges at a percentile of the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers
from lightning_vlmq.quant.methods import PTQMethod, register, within
from lightning_vlmq.quant.observers import observe_histograms
from lightning_vlmq.quant.rounding import to_blocks
from lightning_vlmq.quant.scheme import QuantScheme


@register("percentile")
@dataclass(frozen=True)
class Percentile(PTQMethod):
    """Ranges leave out the rarest values on either side (Wu et al. 2020, arXiv 2004.09602, "Calibration").

    Activations are clipped by a 4096-bin histogram over all calibration batches, weights exactly, block by block
    with linear interpolation (so a block of a few hundred weights loses a little of its extreme value). What the clipped
    values lose, all others gain: their step is that much smaller. torchao has no such observer.

    Attributes:
        share: of the values at or below the upper end of a range; as many lie at or above the lower one. The paper compares
            0.9999 with 0.999, 0.99999 and 0.999999.
        clip_weights: whether weights are clipped too; the paper takes their extreme values (section 3.2 of it, "max").
    """

    share: float = within(0.9999, 0.5, 1)
    clip_weights: bool = True

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix activation grids between two quantiles of each layer's input."""
        layers = static_layers(vlm)
        for name, histogram in observe_histograms(vlm, scheme, calibration).items():
            ends = torch.tensor([[histogram.quantile(1 - self.share)], [histogram.quantile(self.share)]])
            layers[name].act_fake_quant.set_range(ends[0], ends[1])

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's weight grid between two quantiles of each block."""
        if not self.clip_weights:
            super().fit_weight(layer)
            return
        quantizer = layer.weight_fake_quant
        blocks = to_blocks(layer.weight, quantizer.granularity)
        rows = blocks.reshape(1, -1) if isinstance(quantizer.granularity, PerTensor) else blocks
        quantizer.set_range(_quantile(rows, 1 - self.share), _quantile(rows, self.share))


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Quantile of each row with linear interpolation; ``torch.quantile`` refuses rows of more than 2^24 values."""
    ordered = rows.sort(dim=1).values
    place = share * (rows.shape[1] - 1)
    below = int(place)
    return torch.lerp(ordered[:, below], ordered[:, min(below + 1, rows.shape[1] - 1)], place - below)
