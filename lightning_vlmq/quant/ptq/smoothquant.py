"""Move activation outliers into the weights (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibration import Batch, calibrate
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod
from lightning_vlmq.quant.observers import ChannelObserver
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.quant.transforms import ChannelScale, scale_input_channels

ALPHA = 0.5
FLOOR = 1e-5
"""Smallest magnitude of a channel, as in the authors' code: a channel that is zero throughout must not give a zero factor."""


@METHODS.register("smoothquant")
class SmoothQuant(PTQMethod):
    """Divide input channel j by ``s_j = max|X_j|^a / max|W_j|^(1-a)`` and multiply the weight's by it, then min-max.

    Xiao et al. 2023 (arXiv 2211.10438), Eq. 3 and 4, with the migration strength ``a = 0.5`` of section 4. The factor
    stands at each layer's input, not in the LayerNorm before it, so that layers without one (attention output, second
    MLP layer, convolutions) are smoothed too. torchao's prototype covers linear layers alone and by default keeps
    every calibration input.
    """

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Smooth every layer."""
        layers = quantized_layers(vlm)
        observers = {name: ChannelObserver(layer) for name, layer in layers.items()}
        calibrate(vlm, scheme, calibration, observers)
        for name, layer in layers.items():
            largest = torch.as_tensor(observers[name].absolute_maximum).clamp_min(FLOOR)
            factor = (largest**ALPHA / weight_channel_maximum(layer).clamp_min(FLOOR) ** (1 - ALPHA)).clamp_min(FLOOR)
            install_channel_scale(layer, factor)


def weight_channel_maximum(layer: QuantizedLayer) -> Tensor:
    """Largest weight magnitude that meets each input channel, ``[channels]``."""
    weight = layer.weight.detach().abs()
    if not isinstance(layer, nn.Conv2d):
        return weight.amax(0)
    per_group = weight.amax((2, 3)).view(layer.groups, layer.out_channels // layer.groups, -1)
    return per_group.amax(1).flatten()


def install_channel_scale(layer: QuantizedLayer, factor: Tensor) -> None:
    """Divide a layer's input channels by ``factor`` (``[channels]``, positive) and multiply its weight's by it."""
    layer.set_weight(scale_input_channels(layer, layer.weight, factor))
    layer.input_transform = ChannelScale(factor.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else factor)
