"""Fits of quantized layers, kept to be put in place again: several can be told by what the model then computes."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer


class Grid:
    """A quantizer's grid as it is now."""

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self._quantizer = quantizer
        self._scale, self._zero_point = quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone()
        self._clipping = quantizer.clipping

    def restore(self) -> None:
        """Put it back."""
        self._quantizer.set_qparams(self._scale, self._zero_point)
        self._quantizer.clipping = self._clipping


class Fit:
    """Weights of layers and the grids that they are on."""

    def __init__(self) -> None:
        self._kept: list[tuple[QuantizedLayer, Tensor, Grid]] = []

    def keep(self, layer: QuantizedLayer, weight: Tensor) -> None:
        """Add a layer with the grid that its weight has now, and this weight: its own, or one that is to take its place."""
        self._kept.append((layer, weight, Grid(layer.weight_fake_quant)))

    def restore(self) -> None:
        """Put all of it in place."""
        for layer, weight, grid in self._kept:
            if isinstance(weight, nn.Parameter):
                layer.weight = weight
            else:
                layer.set_weight(weight)
            layer._weight_cache = None
            grid.restore()
